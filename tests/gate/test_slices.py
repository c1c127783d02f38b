"""Slices of a race: what each must show, and what refuses a candidate."""

import numpy as np
import pytest

from onlinespec.config import GateConfig
from onlinespec.gate.slices import MAX_LABELS, REST, Slices, slice_labels
from onlinespec.gate.verdict import Walked

WALK = Walked(200, 100, (100, 60), (60, 40))


def fed(gains, labels, dimension="tenant", **config):
    parts = Slices(3.0, GateConfig(**config))
    for gain, label in zip(gains, labels, strict=True):
        parts.observe({dimension: label}, gain, WALK, WALK)
    return parts


def result_of(parts, label):
    return next(result for result in parts.results() if result.label == label)


def test_a_request_has_one_label_in_each_dimension():
    assert slice_labels("acme", 3, 127, 0.0) == {
        "tenant": "acme",
        "cluster": "3",
        "answer": "of 32 tokens and more",
        "temperature": "greedy",
    }
    assert slice_labels("", None, 128, 0.7)["answer"] == "of 128 tokens and more"
    assert slice_labels("", None, 128, 0.7)["temperature"] == "sampling"
    assert slice_labels("", None, 0, 0.7)["cluster"] == "(none)"


def test_a_slice_that_is_the_whole_race_asks_nothing():
    parts = fed([0.0] * 5, ["a"] * 5)

    assert parts.unproven is None
    assert not result_of(parts, "a").is_required


def test_a_large_slice_is_waited_for_until_it_is_shown_to_hold():
    parts = fed([0.1] * 6, ["a", "a", "b"] * 2)
    assert parts.unproven is not None

    for _ in range(40):
        parts.observe({"tenant": "a"}, 0.1, WALK, WALK)
        parts.observe({"tenant": "b"}, 0.1, WALK, WALK)

    assert parts.unproven is None
    assert result_of(parts, "b").is_required
    assert result_of(parts, "b").e_proof > 10.0


def test_a_small_slice_is_not_waited_for():
    parts = fed([0.5] * 30 + [0.0], ["a"] * 30 + ["b"])

    assert not result_of(parts, "b").is_required
    assert parts.unproven is None


def test_small_slices_together_are_waited_for():
    labels = [label for number in range(20) for label in ("a", "a", f"tenant {number % 10}")]
    parts = fed([1.0 if label == "a" else -0.2 for label in labels], labels)

    rest = result_of(parts, REST)

    # The first request of a tenant of the first few is no small share yet.
    assert 16 <= rest.num_requests <= 20
    assert rest.is_required
    assert parts.unproven.label == REST
    assert not any(result.is_required for result in parts.results() if result.label.startswith("tenant"))


def test_a_request_is_in_the_rest_where_its_label_was_small_when_it_came():
    labels = np.random.default_rng(0).choice(["a", "b", "c"], 200, p=[0.6, 0.25, 0.15]).tolist()
    parts = fed([0.0] * 200, labels)

    expected = sum(labels[: n + 1].count(labels[n]) < 0.25 * (n + 1) for n in range(200))
    assert result_of(parts, REST).num_requests == expected


def test_harm_to_a_small_slice_is_shown_at_a_level_that_many_slices_share():
    labels = [label for _ in range(200) for label in ("a",) * 9 + ("b",)]
    parts = Slices(3.0, GateConfig())

    for label in labels:
        parts.observe({"tenant": label}, 0.5 if label == "a" else -0.8, WALK, WALK)
        if parts.harmed:
            break

    assert parts.harmed.label == "b"
    assert sum(result.num_requests for result in parts.results() if result.label != REST) < 400
    # The second slice of two: 0.1 / (2 * 3).
    assert result_of(parts, "b").harm_threshold == pytest.approx(60.0)
    assert result_of(parts, "b").e_harm >= 60.0
    assert "tenant b (-0.80 tokens over" in str(parts.harmed)


def test_a_loss_within_the_tolerance_is_seldom_taken_for_harm():
    random = np.random.default_rng(1)
    num_refused = 0
    for _ in range(100):
        labels = random.choice(list("abcdef"), 120).tolist()
        parts = Slices(3.0, GateConfig())
        for gain, label in zip(random.normal(-0.2, 0.2, 120).tolist(), labels, strict=True):
            parts.observe({"tenant": label}, gain, WALK, WALK)
            if parts.harmed:
                num_refused += 1
                break

    assert num_refused <= 100 * 0.1 + 3 * 3


def test_memory_is_bounded_and_the_labels_beyond_count_in_the_rest():
    labels = [f"tenant {number}" for number in range(500)]
    parts = fed([0.0] * 500, labels)

    assert len(parts.results()) == MAX_LABELS + 1
    assert result_of(parts, REST).num_requests >= 500 - MAX_LABELS


def test_no_client_can_name_the_rest():
    parts = fed([0.0] * 40, ["a"] * 30 + [REST] * 10)

    assert sorted(result.num_requests for result in parts.results() if result.label == REST) == [9, 10]


def test_a_result_says_what_both_drafts_had_accepted_there():
    parts = fed([0.1] * 3, ["a", "b", "a"])

    assert result_of(parts, "a").incumbent == Walked(400, 200, (200, 120), (120, 80))
    assert result_of(parts, "a").candidate.accept_length == 2.0
    assert result_of(parts, "a").mean_gain_tokens == pytest.approx(0.1)
