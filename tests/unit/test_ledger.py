"""What requests owe the cache: the ledger against a count of what each segment computed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_effplugin.techniques.early_exit.ledger import Ledger

EXITS = 3
BLOCK = 8


@st.composite
def runs(draw: st.DrawFn) -> list[tuple[str, int]]:
    """Prompt chunks, decoded tokens by where they leave, and preemptions."""
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("decode"), st.integers(0, EXITS)),
                st.tuples(st.just("preempt"), st.integers(0, 40)),
            ),
            max_size=60,
        )
    )


@settings(max_examples=300, deadline=None)
@given(runs(), st.integers(1, 6), st.integers(1, 20))
def test_every_segment_sees_a_prefix_and_full_blocks_are_exact(
    happens: list[tuple[str, int]], room: int, prompt: int
) -> None:
    ledger = Ledger(1, EXITS, room, BLOCK)
    slot = np.array([0])
    ledger.open(0)
    done = [0] * (EXITS + 1)  # per segment: positions whose keys and values are computed

    def step(start: int, length: int, leaves: int) -> None:
        nonlocal done
        first, last = start, start + length - 1
        done = [min(count, start) for count in done]
        if length == 1 and ledger.must_finish(slot, np.array([last]))[0]:
            leaves = EXITS
        for segment in range(EXITS + 1):
            if segment:
                first -= int(ledger.joining(slot, segment - 1, np.array([first]))[0])
                assert first <= start
                assert last - first <= room or length > 1
                assert first // BLOCK == last // BLOCK or length > 1
            assert done[segment] == first, "attention would miss keys, or they are computed twice"
            done[segment] = last + 1
            if segment == leaves < EXITS:
                ledger.leave(slot, leaves, np.array([first]), np.array([last]))
                assert ledger.has_pending(slot)[0]
                assert ledger.backlog == last + 1 - min(done)
                break
        else:
            ledger.settle(slot)
            assert not ledger.has_pending(slot)[0]
            assert ledger.backlog == 0
        full = (last + 1) // BLOCK * BLOCK
        assert all(count >= full for count in done), "a full block is not exact"

    step(0, prompt, EXITS)
    position = prompt
    for kind, value in happens:
        if kind == "decode":
            step(position, 1, value)
            position += 1
        else:
            kept = min(value, position) // BLOCK * BLOCK
            ledger.open(0)
            done = [min(count, kept) for count in done]
            if kept < position:
                step(kept, position - kept, EXITS)
