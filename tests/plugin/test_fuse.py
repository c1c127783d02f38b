"""Our exceptions end in the fuse; the server sees None and goes on."""

import logging

import pytest

from onlinespec.plugin.fuse import Fuse

RETRY_S = 60.0


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fuse(clock: Clock) -> Fuse:
    return Fuse(max_faults=3, retry_s=RETRY_S, clock=clock)


def fail(kind: type[BaseException] = ValueError) -> None:
    raise kind("bad row")


def open_fuse(fuse: Fuse) -> Fuse:
    for _ in range(3):
        fuse.run(fail)
    return fuse


def test_what_a_function_returns_is_passed_on(fuse: Fuse):
    assert fuse.run(max, 2, 5) == 5
    assert (fuse.state, fuse.last_fault, fuse.counters.total()) == ("closed", "", 0)


def test_an_exception_becomes_none_and_is_counted_by_kind(fuse: Fuse):
    assert fuse.run(fail) is None
    assert fuse.run(fail, KeyError) is None

    assert fuse.counters == {"faults": 2, "fault fail: ValueError": 1, "fault fail: KeyError": 1}
    assert fuse.last_fault == "fail: KeyError: 'bad row'"
    assert fuse.state == "closed"


def test_each_kind_of_fault_is_logged_once_with_its_traceback(fuse: Fuse, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR):
        fuse.run(fail)
        fuse.run(fail)
        fuse.run(fail, KeyError)

    faults = [record for record in caplog.records if "once per kind" in record.message]
    assert ["ValueError" in record.message for record in faults] == [True, False]
    assert all(record.exc_info for record in faults)


def test_after_so_many_faults_the_fuse_opens_and_calls_nothing(fuse: Fuse):
    open_fuse(fuse)
    called: list[int] = []

    result = fuse.run(called.append, 1)

    assert fuse.state == "open"
    assert (result, called) == (None, [])
    assert fuse.counters["faults"] == 3


def test_an_open_fuse_still_calls_what_is_vital(fuse: Fuse):
    open_fuse(fuse)

    assert fuse.run(max, 2, 5, is_vital=True) == 5
    assert fuse.state == "open"


def test_faults_of_what_is_vital_are_counted_and_open_nothing(fuse: Fuse):
    for _ in range(10):
        assert fuse.run(fail, is_vital=True) is None

    assert fuse.state == "closed"
    assert fuse.counters["faults"] == 10


def test_after_the_pause_one_clean_pass_closes_the_fuse_and_forgets_the_faults(fuse: Fuse, clock: Clock):
    open_fuse(fuse)
    clock.now_s += RETRY_S - 0.1
    assert fuse.state == "open"
    clock.now_s += 0.1
    assert fuse.state == "half-open"

    result = fuse.run(max, 2, 5, is_last=True)

    assert (result, fuse.state) == (5, "closed")
    fuse.run(fail)
    assert fuse.state == "closed"


def test_after_the_pause_one_fault_opens_the_fuse_for_another_pause(fuse: Fuse, clock: Clock):
    open_fuse(fuse)
    clock.now_s += RETRY_S

    fuse.run(fail)

    assert fuse.state == "open"
    clock.now_s += RETRY_S
    assert fuse.state == "half-open"


def test_a_pass_that_faults_in_its_last_call_does_not_close_a_half_open_fuse(fuse: Fuse, clock: Clock):
    open_fuse(fuse)
    clock.now_s += RETRY_S

    fuse.run(max, 2, 5)
    fuse.run(fail, is_last=True)

    assert fuse.state == "open"


def test_a_vital_success_does_not_close_a_half_open_fuse(fuse: Fuse, clock: Clock):
    open_fuse(fuse)
    clock.now_s += RETRY_S

    fuse.run(max, 2, 5, is_vital=True)

    assert fuse.state == "half-open"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_the_wish_to_end_the_process_is_not_swallowed(fuse: Fuse, kind: type[BaseException]):
    with pytest.raises(kind):
        fuse.run(fail, kind)

    assert fuse.counters.total() == 0
