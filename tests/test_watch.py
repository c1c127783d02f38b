"""What the guard is told of a finished request."""

from dataclasses import replace

import pytest
import torch

from onlinespec.config import GuardConfig
from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.gate.lag import Lag
from onlinespec.watch import Watch
from tests.draft.tiny import build_draft, build_sample

NUM_STEPS = 3
IN_SERVICE_S = 5.0


def served(missing: list[int]) -> Sample:
    """By version 3, one token a verify step, without the rows of some positions."""
    sample = build_sample(1, num_prompt=6, num_answer=8)
    starts = list(range(6, 13))
    n = len(starts)
    verify = VerifySteps(starts, [NUM_STEPS] * n, [0] * n, [1] * n, [3] * n, [False] * n)
    has_aux_T = torch.arange(sample.num_tokens) < sample.num_tokens - 1
    has_aux_T[missing] = False
    return replace(sample, verify=verify, has_aux_T=has_aux_T, started_s=10.0)


@pytest.mark.parametrize(
    ("missing", "detector"),
    [([], "clean"), ([1, 2], "aged"), ([8], None)],
    ids=["every row", "without rows of a cached prompt", "without a row the walk drafts from"],
)
def test_a_request_is_watched_where_its_walk_can_be_made_and_allowed_more_where_it_is_not_exact(missing, detector):
    watch = Watch(GuardConfig(), 3, 2, build_draft(seed=1), NUM_STEPS, IN_SERVICE_S, Lag(0.1))

    watch.observe(served(missing), torch.zeros((8, NUM_STEPS), dtype=torch.bool), None, now_s=20.0)

    counted = {name: d.num_requests for name, d in watch.guard.detectors.items() if d.num_requests}
    assert counted == ({detector: 1} if detector else {})
    assert watch.guard.num_excluded == (detector is None)


@pytest.mark.parametrize(("missing", "is_aged"), [([], False), ([1, 2], True)], ids=["own KV", "an older draft's"])
def test_what_older_drafts_left_is_what_the_lag_is_told_of(missing: list[int], is_aged: bool):
    lag = Lag(0.1)
    watch = Watch(GuardConfig(), 3, 2, build_draft(seed=1), NUM_STEPS, IN_SERVICE_S, lag)

    watch.observe(served(missing), torch.ones((8, NUM_STEPS), dtype=torch.bool), None, now_s=20.0)

    assert (lag.mean_tokens < -1.0) == is_aged


def test_a_request_from_before_prefixes_were_renewed_says_nothing_of_those_after():
    lag = Lag(0.1)
    watch = Watch(GuardConfig(), 3, 2, build_draft(seed=1), NUM_STEPS, IN_SERVICE_S, lag)
    lag.renewed(3, now_s=15.0)

    watch.observe(served([1, 2]), torch.ones((8, NUM_STEPS), dtype=torch.bool), None, now_s=20.0)

    assert lag.mean_tokens == 0.0
    assert watch.guard.num_excluded == 1
