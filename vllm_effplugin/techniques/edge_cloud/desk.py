"""Where requests of an edge wait for tokens of the cloud.

A request whose last exit is not sure of a token is parked: the engine is told of no token, so that
its scheduler passes the request over, cache and all, while the others go on. The answer comes with
a later step; if none comes, the edge's own token takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from vllm_effplugin.techniques.edge_cloud.link import Link, Outcome


@dataclass(frozen=True)
class Question:
    """A token that the edge is not sure of.

    Attributes:
        position: behind which it stands.
        sampling: how the cloud has to draw it.
    """

    position: int
    sampling: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a parked request goes on with.

    Attributes:
        token: its next one; None where the step that asked has it.
        origin: `cloud`, or why it is the edge's own.
        waited: seconds since the question.
        computed: of these, seconds that the cloud's engine took.
    """

    token: int | None
    origin: str
    waited: float = 0.0
    computed: float = 0.0


class Desk:
    """The parked requests of an engine.

    Args:
        link: to the cloud.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._parked: dict[str, tuple[int, int]] = {}
        self._asked: dict[str, int] = {}
        self._told: dict[str, Outcome] = {}

    def park(self, request: str, question: Question, own: int) -> Answer | None:
        """Ask the cloud, unless that makes no sense now.

        Args:
            own: the edge's token.

        Returns:
            None where the request waits; otherwise why it goes on with its own token.
        """
        told = self._told.get(request)
        if told is not None and told.position != question.position:
            del self._told[request]
            told = None
        if told is None and self._asked.get(request) != question.position:
            if not self._link.up:
                return Answer(None, "link")
            self._link.ask(request, question.position, question.sampling)
            self._asked[request] = question.position
        self._parked[request] = question.position, own
        return None

    def answers(self) -> dict[str, Answer]:
        """Requests that wait no longer."""
        for outcome in self._link.poll():
            self._told[outcome.request] = outcome
            self._asked.pop(outcome.request, None)
        found: dict[str, Answer] = {}
        for request, (position, own) in list(self._parked.items()):
            told = self._told.get(request)
            if told is None or told.position != position:
                continue
            del self._parked[request], self._told[request]
            token = own if told.token is None else told.token
            found[request] = Answer(token, told.reason, told.waited, told.computed)
        return found

    @property
    def waits(self) -> bool:
        """Whether a request is parked."""
        return bool(self._parked)

    def flush(self) -> None:
        """Have what was handed over sent."""
        self._link.flush()

    def unpark(self, requests: Iterable[str]) -> None:
        """These lost their cache, and run again up to where they were; their questions stay."""
        for request in requests:
            self._parked.pop(request, None)

    def close(self, requests: Iterable[str]) -> None:
        """These have ended."""
        for request in requests:
            self._parked.pop(request, None)
            self._asked.pop(request, None)
            self._told.pop(request, None)
            self._link.close(request)
