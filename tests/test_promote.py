"""From the gate's one customer: what it makes of an accept walk."""

import torch

from onlinespec.draft.walk import accept_walk
from onlinespec.gate.verdict import Walked
from onlinespec.promote import walked

NUM_STEPS = 3


def test_a_walk_is_counted_by_draft_position_up_to_the_last_token():
    matches_RK = torch.rand((40, NUM_STEPS), generator=torch.Generator().manual_seed(0)) < 0.7
    start, end = 10, 49

    steps = accept_walk(matches_RK, start, end, NUM_STEPS)
    found = walked(steps, end, NUM_STEPS)

    reached, matched, num_tokens, position = [0] * NUM_STEPS, [0] * NUM_STEPS, 0, start
    for step in range(len(steps)):
        assert steps.start[step] == position
        for k in range(NUM_STEPS):
            # The drafted token stands at position + k + 1; past the end nobody knows what it should have been.
            if position + k + 1 > end:
                break
            reached[k] += 1
            if not matches_RK[position - start, k]:
                break
            matched[k] += 1
        num_tokens += steps.num_committed[step]
        position += steps.num_committed[step]
    assert found == Walked(num_tokens, len(steps), tuple(reached), tuple(matched))
    assert reached[0] > reached[1] > reached[2] > 0


def test_a_walk_without_a_step_counts_nothing():
    steps = accept_walk(torch.zeros((0, NUM_STEPS), dtype=torch.bool), 5, 5, NUM_STEPS)

    assert walked(steps, 5, NUM_STEPS) == Walked(0, 0, (0, 0, 0), (0, 0, 0))
