"""Rows that grow, and what of them is sent."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import torch

from vllm_effplugin.engine.streamed_rows import GrowingRows, ReceivedRows, SentRows

WIDTH = 3


def test_rows_grow_and_views_stay():
    torch.manual_seed(0)
    pieces = [torch.randn(count, WIDTH) for count in (5, 1, 1, 0, 7, 1, 40, 1)]
    rows = GrowingRows(pieces[0])
    views = [rows.all, *(rows.add(piece) for piece in pieces[1:])]
    for count, view in enumerate(views, start=1):
        assert torch.equal(view, torch.cat(pieces[:count]))


def step(states: dict[str, torch.Tensor | None], finished: tuple[str, ...] = ()) -> Any:
    new = [SimpleNamespace(req_id=name, prompt_embeds=rows) for name, rows in states.items()]
    return SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=set(finished))


def sent(output: Any) -> tuple[Any, int]:
    raw = pickle.dumps(output)
    return pickle.loads(raw), len(raw)


def test_a_step_carries_what_is_new_and_workers_see_all():
    sender, receiver = SentRows(), ReceivedRows()
    rows = GrowingRows(torch.randn(1000, WIDTH))
    whole, sizes = rows.all, []
    for count in range(20):
        output = step({"a": whole, "text": None})
        sender.cut(output)
        output, size = sent(output)
        receiver.complete(output)
        got, text = output.scheduled_new_reqs
        assert torch.equal(got.prompt_embeds, whole)
        assert text.prompt_embeds is None
        sizes.append(size)
        whole = rows.add(torch.randn(1 + count % 2, WIDTH))
    assert sizes[0] > 1000 * WIDTH * 4
    assert max(sizes[1:]) < 2000


def test_a_name_that_comes_again_starts_afresh():
    sender, receiver = SentRows(), ReceivedRows()
    for turn in range(2):
        states = torch.full((4, WIDTH), float(turn))
        output = step({"a": states}, finished=("a",) if turn else ())
        sender.cut(output)
        receiver.complete(output)
        assert torch.equal(output.scheduled_new_reqs[0].prompt_embeds, states)
        sender.forget("a")
