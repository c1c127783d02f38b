"""Falls of acceptance, told apart from what only looks like one."""

import random

import pytest

from onlinespec.config import DriftConfig
from onlinespec.draft.sample import VerifySteps
from onlinespec.trainer.drift import Acceptance, Drift, accepted_by_position

CONFIG = DriftConfig(slack_frac=0.05, threshold=20.0, min_steps=200)
STEPS_EACH = 20


def request(rng: random.Random, accept: float, version: int = 1, depth: int = 3, num_steps: int = STEPS_EACH):
    """Verify steps that accept each drafted token with one probability until the first miss."""
    verify = VerifySteps()
    for step in range(num_steps):
        correct = 0
        while correct < depth and rng.random() < accept:
            correct += 1
        verify.start.append(step)
        verify.num_drafted.append(depth)
        verify.num_correct.append(correct)
        verify.num_committed.append(correct + 1)
        verify.version.append(version)
        verify.is_mixed.append(False)
    return verify


class Traffic:
    """Requests of clusters with acceptances of their own, into one detector."""

    def __init__(self, seed: int = 0, config: DriftConfig = CONFIG):
        self.drift = Drift(config)
        self.events: list = []
        self.rng = random.Random(seed)

    def play(self, num_requests: int, accept: dict[int, float], shares=None, version: int = 1, depth: int = 3):
        for _ in range(num_requests):
            cluster = self.rng.choices(list(accept), shares)[0]
            verify = request(self.rng, accept[cluster], version, depth)
            self.events += self.drift.observe(cluster, verify, version)
        return self

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]


def test_steady_traffic_raises_nothing():
    traffic = Traffic().play(600, {0: 0.7, 1: 0.4})

    assert traffic.events == []


def test_a_fall_in_one_cluster_is_told_once_with_its_cluster_and_what_it_was():
    traffic = Traffic().play(200, {0: 0.7, 1: 0.6}).play(300, {0: 0.7, 1: 0.3})

    assert traffic.kinds == ["traffic"]
    event = traffic.events[0]
    assert (event.cluster, event.position) == (1, 1)
    assert event.was == pytest.approx(0.6, abs=0.05)
    assert event.now == pytest.approx(0.3, abs=0.1)
    assert "cluster 1" in str(event)
    assert (traffic.drift.counters, traffic.drift.last) == ({"traffic": 1}, event)


def test_a_second_fall_is_told_again():
    traffic = Traffic().play(100, {0: 0.8}).play(100, {0: 0.55}).play(100, {0: 0.3})

    assert traffic.kinds == ["traffic", "traffic"]


def test_a_fall_at_a_later_position_only_is_seen_there():
    drift, events = Drift(CONFIG), []
    for number in range(300):
        second = 2 if number < 100 else 1
        verify = VerifySteps([0] * 20, [3] * 20, [second] * 20, [second + 1] * 20, [1] * 20, [False] * 20)
        events += drift.observe(0, verify, 1)

    assert [(event.kind, event.position) for event in events] == [("traffic", 2)]


def test_a_change_of_the_mix_is_no_drift_and_is_told_as_what_it_is():
    traffic = Traffic().play(300, {0: 0.8, 1: 0.4}, shares=[9, 1]).play(300, {0: 0.8, 1: 0.4}, shares=[1, 9])

    assert traffic.kinds == ["mix"]
    assert traffic.events[0].cluster is None
    assert traffic.events[0].was > traffic.events[0].now + 0.1


def test_a_fall_too_thin_in_each_of_many_clusters_is_seen_over_all_of_them():
    before, after = (dict.fromkeys(range(8), accept) for accept in (0.7, 0.5))
    traffic = Traffic().play(160, before).play(30, after)

    assert traffic.kinds[0] == "traffic"
    assert traffic.events[0].cluster is None


@pytest.mark.parametrize(("before", "after"), [(5, 1), (1, 5), (3, 2)])
def test_a_change_of_depth_raises_nothing(before: int, after: int):
    traffic = Traffic().play(200, {0: 0.7}, depth=before).play(200, {0: 0.7}, depth=after)

    assert traffic.events == []


def test_a_better_draft_raises_what_is_expected():
    traffic = Traffic().play(300, {0: 0.4}).play(60, {0: 0.7}, version=2).play(60, {0: 0.5}, version=2)

    assert traffic.kinds == ["traffic"]
    assert traffic.events[0].was == pytest.approx(0.7, abs=0.05)


def test_a_worse_draft_is_told_as_the_drafts_fault():
    traffic = Traffic().play(100, {0: 0.7}).play(100, {0: 0.4}, version=2)

    assert traffic.kinds == ["draft"]


def test_traffic_that_turns_long_after_a_swap_is_told_as_traffic():
    traffic = Traffic().play(100, {0: 0.7}).play(60, {0: 0.7}, version=2).play(60, {0: 0.4}, version=2)

    assert traffic.kinds == ["traffic"]


def test_a_fall_does_not_add_up_over_swaps():
    traffic = Traffic().play(100, {0: 0.7})
    for version in range(2, 12):
        traffic.play(3, {0: 0.5}, version=version)

    assert traffic.events == []


def test_steps_of_another_draft_and_mixed_ones_do_not_count():
    verify = VerifySteps(
        [0, 1, 2, 3], [3, 3, 3, 3], [0, 2, 3, 0], [1, 3, 4, 1], [1, 2, 2, 2], [False, True, False, False]
    )

    assert accepted_by_position(verify, 2) == [(1, 2), (1, 1), (1, 1)]
    assert accepted_by_position(verify, 3) == []
    assert Drift(CONFIG).observe(0, verify, 3) == []


def test_acceptance_by_position_is_that_of_a_loop_over_steps():
    rng = random.Random(3)
    depths = [rng.randrange(0, 5) for _ in range(200)]
    correct = [rng.randrange(0, depth + 1) for depth in depths]
    verify = VerifySteps([0] * 200, depths, correct, [n + 1 for n in correct], [7] * 200, [False] * 200)

    found = accepted_by_position(verify, 7)

    for k in range(1, 5):
        reached = accepted = 0
        for depth, count in zip(depths, correct, strict=True):
            if depth >= k and count >= k - 1:
                reached += 1
                accepted += count >= k
        assert found[k - 1] == (accepted, reached)


def test_a_new_cluster_that_is_accepted_less_is_new_traffic_once_and_one_that_is_not_is_nothing():
    poor = Traffic().play(100, {0: 0.7}).play(150, {0: 0.7, 1: 0.3})
    good = Traffic().play(100, {0: 0.7}).play(150, {0: 0.7, 1: 0.75})

    assert poor.kinds.count("new_traffic") == 1
    assert set(poor.kinds) <= {"new_traffic", "mix"}
    assert poor.events[poor.kinds.index("new_traffic")].cluster == 1
    assert good.events == []


def test_clusters_known_from_the_start_are_not_new_however_poor():
    traffic = Traffic().play(200, {0: 0.7, 1: 0.2})

    assert traffic.events == []


def test_clusters_that_are_no_more_are_forgotten():
    drift = Traffic().play(50, {0: 0.7, 1: 0.4}).drift

    drift.keep_only([1])

    assert set(drift.acceptance()) == {1}


def test_where_requests_differ_much_the_threshold_grows_with_their_spread():
    rng = random.Random(0)
    alike, unlike = Acceptance(), Acceptance()
    for _ in range(500):
        alike.observe(sum(rng.random() < 0.5 for _ in range(20)), 20, CONFIG)
        unlike.observe(rng.choice([2, 18]), 20, CONFIG)

    assert alike.design_effect == pytest.approx(1.0, abs=0.2)
    assert unlike.design_effect == pytest.approx(8**2 / (20 * 0.25), rel=0.1)


def test_switched_off_it_sees_nothing():
    off = DriftConfig(enabled=False)

    traffic = Traffic(config=off).play(100, {0: 0.9}).play(100, {0: 0.1})

    assert traffic.events == []


def test_a_restart_goes_on_where_it_stood():
    unbroken = Traffic(seed=4).play(150, {0: 0.7, 1: 0.5}).play(150, {0: 0.4, 1: 0.5})
    first = Traffic(seed=4).play(150, {0: 0.7, 1: 0.5}).play(3, {0: 0.4, 1: 0.5})
    second = Traffic(seed=4)
    second.rng = first.rng

    second.drift.load_state(first.drift.state())
    second.play(147, {0: 0.4, 1: 0.5})

    assert unbroken.kinds == ["traffic"]
    assert second.events == unbroken.events
    assert second.drift.state() == unbroken.drift.state()
