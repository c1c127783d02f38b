"""How long a race may take before it makes room."""

from onlinespec.config import GateConfig
from onlinespec.gate.patience import Patience

CONFIG = GateConfig(patience_requests=10, max_requests=70)


def cut_short(times: int) -> Patience:
    patience = Patience(CONFIG)
    for _ in range(times):
        patience.cut_short()
    return patience


def test_it_doubles_with_each_race_cut_short_up_to_the_most_a_race_may_take():
    assert [cut_short(times).requests for times in range(5)] == [10, 20, 40, 70, 70]


def test_a_quick_promotion_brings_it_back_and_a_slow_one_leaves_it():
    quick, middling, slow = (cut_short(2) for _ in range(3))

    quick.promoted(3)
    middling.promoted(12)
    slow.promoted(39)

    assert (quick.requests, middling.requests, slow.requests) == (10, 24, 40)


def test_a_race_at_a_lower_level_may_take_as_many_more_as_its_threshold_asks():
    patience = cut_short(1)

    assert patience.within(0.05) == 20
    assert patience.within(0.05**2) == 40
    assert patience.within(1e-9) == 70


def test_drift_starts_it_again():
    patience = cut_short(3)

    patience.drifted()

    assert patience.requests == 10
