"""The link against a real HTTP server, whose engine is none; and against servers that misbehave."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response

from tests.e2e.server import free_port
from tests.unit.test_edge_service import SIZE, FakeEngine, make
from vllm_effplugin.engine.endpoint import router
from vllm_effplugin.errors import ConfigError
from vllm_effplugin.techniques.edge_cloud import link as module
from vllm_effplugin.techniques.edge_cloud.link import Link, LinkSettings, Outcome
from vllm_effplugin.techniques.edge_cloud.service import CloudService
from vllm_effplugin.techniques.edge_cloud.wire import read_frames

PATIENCE = 10.0


class Server:
    """An ASGI application on a port of its own, which can go and come back."""

    def __init__(self, app: Any) -> None:
        self.port, self.app = free_port(), app
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(self.app, port=self.port, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until(lambda: self._server.started)

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(timeout=10)


def cloud(**limits: Any) -> FastAPI:
    app = FastAPI()
    app.include_router(router)
    app.state.effplugin_cloud = made = make(**limits)

    @app.get("/forget")
    async def forget() -> None:
        for context in list(made.contexts._all.values()):
            made.contexts.close(context)

    return app


def shrink(app: FastAPI, **limits: int) -> None:
    """Limits that no configuration allows."""
    made = app.state.effplugin_cloud
    made.limits = made.limits.model_copy(update=limits)


def delay(app: FastAPI, seconds: Callable[[int], float]) -> list[int]:
    """Hold messages up; their numbers, from 1 on, as they come."""
    came: list[int] = []

    @app.middleware("http")
    async def held_up(request: Request, go_on: Any) -> Any:
        if request.method == "POST":
            came.append(len(came) + 1)
            await asyncio.sleep(seconds(came[-1]))
        return await go_on(request)

    return came


class Slow(FakeEngine):
    """Takes its time."""

    seconds = 0.5

    def open(self, *args: Any) -> Any:
        stream = super().open(*args)
        run = stream.next

        async def next(*given: Any) -> int:
            await asyncio.sleep(self.seconds)
            return await run(*given)

        stream.next = next
        return stream


def service(server: Server) -> CloudService:
    found: CloudService = server.app.state.effplugin_cloud
    return found


def until(holds: Callable[[], Any], patience: float = PATIENCE) -> None:
    limit = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < limit, "it took too long"
        time.sleep(0.005)


@contextmanager
def linked(server: Server, wait: bool = True, **changes: Any) -> Iterator[Link]:
    settings = {
        "url": f"http://127.0.0.1:{server.port}", "model": "m", "hidden_size": SIZE,
        "encoding": "fp32", "deadline_s": 5.0, **changes,
    }  # fmt: skip
    link = Link(LinkSettings.model_validate(settings))
    try:
        if wait:
            until(lambda: link.up)
        yield link
    finally:
        link.stop()
        server.stop()


def upload(link: Link, first: int, end: int, request: str = "r") -> None:
    rows = np.arange(first, end, dtype=np.float32)[:, None].repeat(SIZE, 1)
    link.add(request, first, rows)
    link.flush()


def question(link: Link, position: int, request: str = "r", **sampling: Any) -> None:
    link.ask(request, position, sampling)
    link.flush()


def outcomes(link: Link, count: int = 1) -> list[Outcome]:
    found: list[Outcome] = []
    until(lambda: found.extend(link.poll()) or len(found) >= count)
    assert len(found) == count
    return found


def answer(link: Link, position: int, **sampling: Any) -> Outcome:
    question(link, position, **sampling)
    [found] = outcomes(link)
    assert (found.request, found.position) == ("r", position)
    return found


def test_tokens_arrive_and_positions_go_up_once() -> None:
    with linked(server := Server(cloud())) as link:
        upload(link, 0, 20)
        found = answer(link, 19, temperature=0.5)
        assert (found.token, found.reason) == (19, "cloud")
        assert 0 < found.computed <= found.waited < PATIENCE
        for position in range(20, 25):
            upload(link, position, position + 1)
        assert answer(link, 24).token == 20024
        link.close("r")
        link.flush()
        until(lambda: service(server).contexts.totals["closed"] == 1)
        assert (link.totals["uploaded"], link.totals["repeated"]) == (25, 0)
        totals = service(server).contexts.totals
        assert (totals["received"], totals["repeated"], totals["computed"]) == (25, 0, 25)
        engine: Any = service(server).engine
        assert engine.temperatures == [0.5, 0.0]


def test_many_requests_share_messages() -> None:
    with linked(server := Server(cloud())) as link:
        service(server).engine.most_streams = service(server).engine.most_blocks = 1000
        names = [f"r{n}" for n in range(40)]
        for name in names:
            upload(link, 0, 5, name)
        until(lambda: link.totals["uploaded"] == 200)
        before = link.totals["exchanges"]
        assert before < 15
        for name in names:
            link.ask(name, 4, {})
        link.flush()
        found = outcomes(link, 40)
        assert {each.request for each in found} == set(names)
        assert all(each.token == 4 for each in found)
        # One where nothing interrupts the loop above; few on a busy machine.
        assert before < link.totals["exchanges"] <= before + 8


def test_messages_do_not_overtake_each_other() -> None:
    """What comes first may take longest: a prompt, before the question behind it."""
    app = cloud()
    came = delay(app, lambda number: 0.3 / number)
    with linked(server := Server(app)) as link:
        upload(link, 0, 6)
        until(lambda: came == [1])
        upload(link, 6, 7)
        found = answer(link, 6)
        assert (found.token, found.reason) == (6, "cloud")
        assert link.totals["repeated"] == 0
        assert service(server).totals["replays"] == 0


def test_a_cloud_that_starts_afresh_is_told_everything_again() -> None:
    with linked(server := Server(cloud())) as link:
        upload(link, 0, 6)
        assert answer(link, 5).token == 5
        server.stop()
        upload(link, 6, 7)
        found = answer(link, 6)  # who was about to be asked is gone
        assert (found.token, found.reason) == (None, "link")
        until(lambda: not link.up)
        question(link, 6)
        assert outcomes(link)[0].waited < 0.2  # nobody waits for who is known to be gone
        server.app = cloud()
        server.start()
        began = time.monotonic()
        until(lambda: link.up)
        assert time.monotonic() - began < 2.0
        upload(link, 7, 8)
        assert answer(link, 7).token == 7
        assert service(server).contexts.totals["received"] == 8


def test_a_cloud_that_forgot_a_session_is_told_again() -> None:
    with linked(server := Server(cloud())) as link:
        upload(link, 0, 6)
        assert answer(link, 5).token == 5
        assert httpx.get(f"http://127.0.0.1:{server.port}/forget").status_code == 200
        upload(link, 6, 7)
        found = answer(link, 6, temperature=0.25)
        assert (found.token, found.reason) == (6, "cloud")
        engine: Any = service(server).engine
        assert engine.temperatures == [0.0, 0.25]


def test_a_link_that_was_cut_goes_on_where_it_was() -> None:
    """The cloud still has the session: nothing goes up twice."""
    with linked(server := Server(cloud())) as link:
        upload(link, 0, 6)
        assert answer(link, 5).token == 5
        server.stop()
        upload(link, 6, 7)
        assert answer(link, 6).reason == "link"
        server.start()
        until(lambda: link.up)
        upload(link, 7, 8)
        assert answer(link, 7).token == 6007
        totals = service(server).contexts.totals
        assert (totals["received"], totals["repeated"], totals["recomputed"]) == (8, 0, 0)


def test_slow_answers_are_not_waited_for_and_not_given_late() -> None:
    app = cloud()
    app.state.effplugin_cloud.engine = slow = Slow()
    with linked(Server(app), deadline_s=0.2) as link:
        upload(link, 0, 6)
        found = answer(link, 5)
        assert (found.token, found.reason) == (None, "deadline")
        assert 0.2 <= found.waited < 0.45
        slow.seconds = 0.0
        until(lambda: slow.ran == 6)
        upload(link, 6, 7)
        assert answer(link, 6).token == 6006  # not the answer to the other question
        assert not list(link.poll())


def test_what_the_cloud_says_is_the_reason() -> None:
    with linked(server := Server(cloud())) as link:
        service(server).engine.most_streams = 0
        upload(link, 0, 5)
        assert answer(link, 4).reason == "full"
        assert link.up


def test_a_session_that_grows_too_long_is_over_and_harms_nobody() -> None:
    # A question that its cloud cannot answer must not be waited for: the deadline is short.
    with linked(server := Server(cloud(sequence=10)), deadline_s=0.3) as link:
        upload(link, 0, 10)
        assert answer(link, 9).token == 9
        for position in range(10, 14):
            upload(link, position, position + 1)
            found = answer(link, position)
            assert (found.reason, link.state) == ("too_long", "up")
        assert link.totals["uploaded"] == 11  # and no more goes up
        made = service(server)
        until(lambda: made.contexts.totals["closed"] == 1)
        engine: Any = made.engine
        until(lambda: engine.open_streams == 0)
        upload(link, 0, 5, "s")
        question(link, 4, "s")
        assert outcomes(link)[0].token == 4
        assert link.totals["failures"] == 0


def test_a_full_cloud_is_asked_again_with_the_next_token_only() -> None:
    with linked(server := Server(cloud(positions=10))) as link:
        upload(link, 0, 8, "other")
        question(link, 7, "other")
        assert outcomes(link)[0].token == 7
        [other] = list(service(server).contexts._all.values())
        other.busy = 1  # so that it is not forgotten
        upload(link, 0, 6)
        assert answer(link, 5).reason == "full"
        asked = link.totals["exchanges"]
        time.sleep(0.3)
        assert link.totals["exchanges"] == asked
        other.busy = 0
        upload(link, 6, 7)
        assert answer(link, 6).token == 6
        assert link.totals["failures"] == 0


def test_a_long_upload_goes_in_messages_that_the_cloud_takes() -> None:
    with linked(server := Server(cloud(message_bytes=1 << 20)), deadline_s=20.0) as link:
        service(server).engine.most_blocks = 1 << 20
        many = (3 << 20) // (4 * SIZE)  # three times what a message holds
        upload(link, 0, many)
        assert answer(link, many - 1).token == many - 1
        assert link.totals["exchanges"] > 3
        assert (link.totals["uploaded"], link.totals["repeated"]) == (many, 0)
        assert link.totals["failures"] == 0
        # Nor does one that starts afresh get all at once.
        server.stop()
        until(lambda: answer(link, many - 1).reason == "link")
        server.app = cloud(message_bytes=1 << 20)
        service(server).engine.most_blocks = 1 << 20
        server.start()
        until(lambda: link.up)
        assert answer(link, many - 1).token == many - 1
        assert service(server).contexts.totals["received"] == many


def test_long_uploads_do_not_queue_up_before_the_link() -> None:
    app = cloud()
    going, most = 0, 0

    @app.middleware("http")
    async def count(request: Request, go_on: Any) -> Any:
        nonlocal going, most
        size = int(request.headers.get("content-length", 0))
        going += size
        most = max(most, going)
        await asyncio.sleep(0.05)
        going -= size
        return await go_on(request)

    with linked(server := Server(app), deadline_s=20.0) as link:
        service(server).engine.most_blocks = service(server).engine.most_streams = 1 << 20
        long = (1 << 20) // (4 * SIZE)
        names = [f"r{n}" for n in range(6)]
        for name in names:
            link.add(name, 0, np.arange(long, dtype=np.float32)[:, None].repeat(SIZE, 1))
            link.ask(name, long - 1, {})
        link.flush()
        assert {each.token for each in outcomes(link, 6)} == {long - 1}
        assert (1 << 20) < most < (2 << 20) + (1 << 18)
        assert (link.totals["uploaded"], link.totals["repeated"]) == (6 * long, 0)
        # What is short does not wait for what is long.
        upload(link, 0, 5 * long, "long")
        question(link, 5 * long - 1, "long")
        upload(link, 0, 5, "short")
        question(link, 4, "short")
        assert [each.request for each in outcomes(link, 2)] == ["short", "long"]


def test_an_upload_that_takes_long_is_no_lost_link() -> None:
    """A message may take longer than an answer."""
    app = cloud()
    inner = app.router

    async def thin(scope: Any, receive: Any, send: Any) -> None:
        async def slowly() -> Any:
            await asyncio.sleep(0.1)
            return await receive()

        await inner(scope, slowly if scope.get("method") == "POST" else receive, send)

    app.router = thin  # type: ignore[assignment]
    server = Server(app)
    with linked(server, deadline_s=0.3) as link:
        service(server).engine.most_blocks = 1 << 20
        many = (4 << 20) // (4 * SIZE)
        began = time.monotonic()
        upload(link, 0, many)
        assert answer(link, many - 1).reason == "deadline"
        until(lambda: service(server).contexts.totals["received"] == many)
        assert time.monotonic() - began > 1.0
        assert (link.state, link.totals["failures"], link.totals["repeated"]) == ("up", 0, 0)
        upload(link, many, many + 1)
        assert answer(link, many).token == many


def test_a_slow_answer_is_no_lost_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.3)
    app = cloud()
    app.state.effplugin_cloud.engine = slow = Slow()
    with linked(Server(app), deadline_s=0.2) as link:
        slow.seconds = 1.5
        upload(link, 0, 6)
        assert answer(link, 5).reason == "deadline"
        slow.seconds = 0.0
        until(lambda: link.totals["failures"] == 1)  # nobody listens for that answer any more
        assert link.up
        upload(link, 0, 3, "s")
        question(link, 2, "s")
        assert outcomes(link)[0].token == 2
        until(lambda: slow.ran == 9)
        upload(link, 6, 7)
        assert answer(link, 6).token == 6006
        assert link.up


def test_a_session_that_ends_while_it_opens_is_closed_all_the_same() -> None:
    app = cloud()
    came = delay(app, lambda number: 0.4 if number == 1 else 0.0)
    with linked(server := Server(app)) as link:
        upload(link, 0, 6)
        until(lambda: came == [1])
        link.close("r")
        upload(link, 0, 3, "s")  # another message, which arrives before
        question(link, 2, "s")
        assert outcomes(link)[0].token == 2
        until(lambda: service(server).contexts.totals["closed"] == 1)
        assert len(service(server).contexts) == 1


def test_a_session_that_ends_while_the_link_is_down_is_closed_later() -> None:
    with linked(server := Server(cloud())) as link:
        upload(link, 0, 6)
        assert answer(link, 5).token == 5
        server.stop()
        upload(link, 6, 7)
        assert answer(link, 6).reason == "link"
        link.close("r")
        link.flush()
        server.start()
        until(lambda: service(server).contexts.totals["closed"] == 1)
        assert not len(service(server).contexts)


def test_a_long_session_goes_up_again_without_being_asked_for() -> None:
    """To a cloud that starts afresh, so that the next question finds it there."""
    with linked(server := Server(cloud(ahead=10))) as link:
        upload(link, 0, 30)
        assert answer(link, 29).token == 29
        server.stop()
        upload(link, 30, 31)
        assert answer(link, 30).reason == "link"
        server.app = cloud(ahead=10)
        server.start()
        until(lambda: service(server).contexts.totals["received"] == 31)
        assert answer(link, 30).token == 30


def test_a_late_refusal_is_not_about_the_next_question() -> None:
    app = cloud()
    app.state.effplugin_cloud.engine = slow = Slow()
    with linked(Server(app), deadline_s=1.0) as link:
        slow.seconds, slow.breaks = 1.2, True
        upload(link, 0, 6)
        assert answer(link, 5).reason == "deadline"
        upload(link, 6, 7)
        question(link, 6)
        time.sleep(0.5)  # the refusal has come
        slow.seconds, slow.breaks = 0.0, False
        [found] = outcomes(link)
        assert (found.position, found.reason) != (6, "engine")


def test_what_failed_while_turned_away_is_sent_again(caplog: pytest.LogCaptureFixture) -> None:
    app = cloud()
    came = 0

    @app.middleware("http")
    async def odd(request: Request, go_on: Any) -> Any:
        nonlocal came
        if request.method != "POST":
            return await go_on(request)
        came += 1
        number = came
        await request.body()
        if number == 1:
            await asyncio.sleep(0.8)
            return Response(status_code=502)
        if number == 2:  # another model's, for a moment
            made = app.state.effplugin_cloud
            frames = read_frames(await request.body(), SIZE, 1 << 20)
            told = made._refused(frames[0], "model", "another")
            return Response(told.pack())
        return await go_on(request)

    with linked(Server(app)) as link:
        upload(link, 0, 6)
        until(lambda: came == 1)
        upload(link, 0, 3, "s")
        question(link, 2, "s")
        assert outcomes(link)[0].reason == "model"
        until(lambda: link.up and link.totals["failures"] == 1)
        assert "turned this edge away: another" in caplog.text
        assert answer(link, 5).token == 5


def test_what_cannot_be_a_connection_is_refused_at_start() -> None:
    for url, key, named in (
        ("http://host:80o1", "", "80o1"),
        ("https://", "", "no host"),
        ("http://host", "k\xe9y", "API key"),
        ("http://host", "key\n", "API key"),
    ):
        settings = LinkSettings(url=url, key=key, model="m", hidden_size=SIZE)
        with pytest.raises(ConfigError, match=named):
            Link(settings)


def test_a_link_that_broke_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with linked(Server(cloud())) as link:
        monkeypatch.setattr(link, "_obey", lambda: 1 / 0)
        upload(link, 0, 3)
        until(lambda: link.state == "broken")
        upload(link, 3, 6)
        link.ask("r", 5, {})
        link.close("r")
        assert not link._commands
        assert not link.up


@pytest.mark.parametrize("said", ["[]", '"ok"', "{}", "noise", '{"model": "m"}'])
def test_what_is_no_cloud_is_looked_at_again(said: str) -> None:
    """A proxy may answer while the cloud starts."""
    app = FastAPI()
    described = cloud().state.effplugin_cloud.describe()
    ready = threading.Event()

    @app.get("/v1/edge_cloud")
    def there() -> Any:
        return described if ready.is_set() else Response(said, media_type="application/json")

    with linked(Server(app), wait=False) as link:
        until(lambda: "does not describe a cloud" in link.state)
        ready.set()
        until(lambda: link.up)


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"model": "n"}, "the cloud of 'm', this is an edge of 'n'"), ({"hidden_size": 4}, "'m'")],
)
def test_another_models_cloud_is_not_used(changes: dict[str, Any], why: str) -> None:
    with linked(Server(cloud()), wait=False, **changes) as link:
        until(lambda: link.state != "down")
        assert why in link.state
        assert not link.up
        link.add("r", 0, np.zeros((5, SIZE), np.float32))
        assert answer(link, 4).reason == "link"


@pytest.mark.parametrize("body", [b"", b"noise" * 20, None])
def test_broken_replies_are_a_broken_link(body: bytes | None) -> None:
    app = FastAPI()
    describe = cloud().state.effplugin_cloud.describe()

    @app.get("/v1/edge_cloud")
    def there() -> dict[str, Any]:
        return describe

    @app.post("/v1/edge_cloud/exchange")
    async def broken(request: Request) -> Response:
        return Response(body or b"", status_code=200 if body is not None else 500)

    with linked(Server(app)) as link:
        upload(link, 0, 5)
        found = answer(link, 4)
        assert (found.token, found.reason) == (None, "link")


def test_bad_messages_get_400() -> None:
    server = Server(app := cloud())
    shrink(app, message_bytes=1000)
    try:
        url = f"http://127.0.0.1:{server.port}/v1/edge_cloud/exchange"
        assert httpx.post(url, content=b"noise" * 20).status_code == 400
        assert httpx.post(url, content=b"EFEC").status_code == 400
        assert httpx.post(url, content=b"x" * 1001).status_code in (400, 413)
        server.app.state.effplugin_cloud = None
        assert httpx.post(url, content=b"").status_code == 404
    finally:
        server.stop()
