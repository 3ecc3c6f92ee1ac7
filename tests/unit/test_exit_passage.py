"""Who leaves, and what waits, decided on the host."""

from __future__ import annotations

import math

import numpy as np
import torch

from vllm_effplugin.techniques.early_exit.costs import Column, Costs, Preference
from vllm_effplugin.techniques.early_exit.exits import together
from vllm_effplugin.techniques.early_exit.ledger import Ledger
from vllm_effplugin.techniques.early_exit.passage import STAYS, Batch, Passage, Wishes

ONES = np.ones(4, dtype=np.int64)
SLOTS = np.arange(4)


def step(preference: Preference, ledger: Ledger, position: int) -> Passage:
    """A step in which rows 0 and 1 fire at the first of two exits."""
    passage = Passage(ledger, preference, True, SLOTS, position * ONES, ONES)
    passage.fired[:2] = 0
    return passage


def test_waiting_tokens_catch_up_where_leaving_does_not_pay() -> None:
    """Otherwise segments would go on for as long as something waits."""
    ledger = Ledger(slots=4, exits=2, max_pending=8, block_size=16)
    departure = step(Preference(None), ledger, 1).depart(0)
    assert departure.leaves.tolist() == [True, True, False, False]
    assert ledger.backlog == 2

    # A cut by itself would pay; that steps of this size gain by it was not seen yet.
    part = Column((1, 2, 4, 8), (1, 1, 2, 2))
    costs = Costs(part, [part] * 3, 0.0, None, 8)
    assert costs.gain(0, tokens=6, staying=2, leaving=2) > 0
    passage = step(Preference(costs), ledger, 2)
    assert passage.waits
    assert not passage.may_leave
    for exit in range(2):
        assert not passage.depart(exit).leaves.any()
    assert passage.batch.firsts.tolist() == [1, 1, 2, 2]
    passage.finish()
    assert ledger.backlog == 0


def test_rows_are_asked_once_and_where_they_want() -> None:
    wishes = Wishes(np.array([[0.5, 0.5], [np.inf, 0.4], [0.6, np.inf], [np.inf, np.inf]]))
    assert wishes.count == 3
    # What decides whether a step has to look at each row is the one that is content with least.
    assert wishes.lowest == [0.5, 0.4]
    fired = np.full(4, STAYS)
    everyone = Batch(SLOTS, ONES, ONES)
    assert wishes.still_asked(0, fired, everyone).tolist() == [0, 2]
    fired[0] = 0
    assert wishes.still_asked(1, fired, everyone).tolist() == [1]
    left = Batch(np.array([1, 2, 3]), ONES[:3], ONES[:3])
    assert wishes.still_asked(1, fired, left).tolist() == [0]
    assert wishes.of(ONES.astype(bool)) is wishes
    decoding = wishes.of(np.array([True, False, True, True]))
    assert decoding.rows.tolist() == [True, False, True, False]
    assert decoding.still_asked(1, np.full(4, STAYS), everyone).tolist() == [0]


def test_the_largest_logit_leaves_out_what_is_no_number() -> None:
    """Of a padded token, for example: it must hide no token that fires."""
    logits = [torch.tensor([0.5, math.nan, 2.0]), torch.tensor([math.nan, -3.0, -4.0])]
    stacked, largest = together(logits)
    assert stacked.shape == (2, 3)
    assert largest.tolist() == [2.0, -3.0]
    assert together([]) == ()
