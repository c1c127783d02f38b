"""The journal: durability of events, and the state that follows from them."""

import json
import subprocess
import sys
import threading

import pytest

from onlinespec.errors import VersionError
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import (
    CanaryEnded,
    DepthChanged,
    GuardTripped,
    Journal,
    Judged,
    Paused,
    Pinned,
    Promoted,
    Published,
    RaceStarted,
    Resumed,
    RolledBack,
    ServerStarted,
    SwapFailed,
    TargetChanged,
    Unpinned,
    Withheld,
)
from onlinespec.versions.state import rollback_from, state_of

APPENDER = """
import sys
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import Journal, Published
journal = Journal(RunPaths(sys.argv[1]))
for number in range(40):
    journal.append(Published(time_s=0.0, version=number, digest=sys.argv[2] * 3000))
"""


@pytest.fixture
def paths(tmp_path):
    paths = RunPaths(tmp_path / "run")
    paths.create()
    return paths


def published(*versions):
    return [Published(time_s=1.0, version=version, digest=f"d{version}") for version in versions]


def promoted(version, from_version, by="gate"):
    return Promoted(time_s=2.0, version=version, from_version=from_version, by=by)


def started(version):
    return ServerStarted(time_s=1.5, version=version)


def test_events_come_back_as_they_were_written(paths):
    events = (
        *published(1, 2),
        started(1),
        RaceStarted(time_s=2.0, candidate_digest="d2", alpha=0.01),
        Judged(time_s=3.0, candidate_digest="d2", verdict={"decision": "promote", "e_value": 120.5}),
        promoted(2, 1),
        RolledBack(time_s=5.0, from_version=2, to_version=1, by="guard", barred_digest="d2"),
        SwapFailed(time_s=6.0, version=3, reason="shape"),
        Withheld(time_s=7.0, candidate_digest="d3", reason="version 1 is pinned"),
        Pinned(time_s=8.0, version=1, reason="audit"),
        Unpinned(time_s=9.0, version=1),
        Paused(time_s=10.0),
        Resumed(time_s=11.0, reason="done"),
        CanaryEnded(time_s=12.0, version=3, decision="pass", evidence={"num_pairs": 12}),
        GuardTripped(time_s=13.0, version=3, detector="quality", evidence={"mean_tokens": -0.5}),
        DepthChanged(time_s=14.0, num_steps=0, by="floor", reason="dear"),
        TargetChanged(time_s=15.0, from_digest="a", to_digest="b"),
    )
    journal = Journal(paths)

    for event in events:
        journal.append(event)

    assert journal.read() == events
    assert json.loads(paths.journal.read_text().splitlines()[0])["event"] == "published"
    assert paths.journal.stat().st_mode & 0o077 == 0


def test_events_of_an_older_journal_are_read(paths):
    paths.journal.write_bytes(
        b'{"event":"published","time_s":1.0,"version":1,"digest":"d1"}\n'
        b'{"event":"promoted","time_s":2.0,"version":1,"from_version":null,"by":"operator"}\n'
    )

    assert Journal(paths).read() == (
        Published(time_s=1.0, version=1, digest="d1"),
        Promoted(time_s=2.0, version=1, from_version=None, by="operator"),
    )


def test_a_run_without_a_journal_has_no_events(paths):
    assert Journal(paths).read() == ()
    assert state_of(()).incumbent is None


@pytest.mark.parametrize(
    "tail", [b'{"event":"publ', b"\0" * 5000, b'{"event":"server_started","time_s":1,"version":9}']
)
def test_a_line_cut_short_by_a_crash_is_skipped_and_then_overwritten(paths, tail):
    journal = Journal(paths)
    journal.append(started(1))
    with open(paths.journal, "ab") as file:
        file.write(tail)

    assert journal.read() == (started(1),)
    journal.append(started(2))

    assert journal.read() == (started(1), started(2))


def test_a_reader_that_follows_sees_what_others_append_and_starts_over_where_an_older_journal_was_put_back(paths):
    writer, reader = Journal(paths), Journal(paths)
    writer.append(started(1))
    assert reader.read() == (started(1),)
    before = paths.journal.read_bytes()

    writer.append(started(2))
    writer.append(started(3))
    assert reader.read() == (started(1), started(2), started(3))

    paths.journal.write_bytes(before)
    assert reader.read() == (started(1),)
    with open(paths.journal, "ab") as file:
        file.write(b"{}\n")
    with pytest.raises(VersionError, match="line 2"):
        reader.read()


def test_a_journal_that_is_one_torn_line_starts_again(paths):
    paths.journal.write_bytes(b"x" * 10_000)

    Journal(paths).append(started(1))

    assert Journal(paths).read() == (started(1),)


@pytest.mark.parametrize("damage", [b"{]\n", b'{"event":"nonsense","time_s":1}\n', b"\n"])
def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(paths, damage):
    journal = Journal(paths)
    journal.append(started(1))
    with open(paths.journal, "ab") as file:
        file.write(damage)
    journal.append(started(2))

    with pytest.raises(VersionError, match="line 2"):
        journal.read()


def test_two_processes_append_whole_lines(paths):
    writers = [subprocess.Popen([sys.executable, "-c", APPENDER, str(paths.root), letter]) for letter in "ab"]

    assert [writer.wait(60) for writer in writers] == [0, 0]
    events = Journal(paths).read()

    for letter in "ab":
        assert [event.version for event in events if event.digest[0] == letter] == list(range(40))


def test_one_decision_waits_for_another_and_appends_do_not(paths):
    journal, order = Journal(paths), []

    def decide():
        with Journal(paths).decision():
            order.append("second")

    with journal.decision():
        waiting = threading.Thread(target=decide)
        waiting.start()
        journal.append(started(1))
        waiting.join(0.2)
        order.append("first")
    waiting.join(30)

    assert order == ["first", "second"]
    assert journal.read() == (started(1),)


def test_an_append_into_a_missing_run_directory_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(VersionError, match=r"journal\.jsonl"):
        Journal(RunPaths(tmp_path / "absent")).append(started(1))


def test_a_full_disk_leaves_the_journal_as_it_was(paths):
    Journal(paths).append(started(1))
    # A file size limit makes the kernel cut the write short, as a full disk does.
    limited = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    )

    child = subprocess.run(
        [sys.executable, "-c", limited + APPENDER, str(paths.root), "a"], capture_output=True, text=True, check=False
    )

    assert "VersionError" in child.stderr
    events = Journal(paths).read()
    assert events[0] == started(1)
    assert paths.journal.read_bytes().endswith(b"\n")


def test_a_promotion_makes_the_version_the_incumbent():
    state = state_of([*published(1, 2), started(1), promoted(2, 1)])

    assert (state.incumbent, state.previous, state.num_promotions) == (2, 1, 1)


def test_an_operators_promotion_does_not_enter_the_error_budget():
    assert state_of([*published(1, 2), started(1), promoted(2, 1, by="operator")]).num_promotions == 0


def test_a_refused_swap_changes_nothing():
    before = [*published(1, 2), started(1)]

    assert state_of([*before, SwapFailed(time_s=3.0, version=2, reason="shape")]) == state_of(before)


def test_a_restart_of_the_server_with_the_incumbent_changes_nothing():
    before = [*published(1, 2), started(1), promoted(2, 1)]

    assert state_of([*before, started(2)]) == state_of(before)


def test_races_count_from_their_start_and_once():
    judged = Judged(time_s=1.0, candidate_digest="x", verdict={})
    begun = RaceStarted(time_s=0.0, candidate_digest="x", alpha=0.01)

    assert state_of([begun, judged]).num_candidates == 1
    assert state_of([begun, begun, judged]).num_candidates == 2
    assert state_of([judged, judged]).num_candidates == 2
    assert state_of([begun]).num_candidates == 1


def test_rolling_back_returns_to_the_version_before_and_bars_the_weights_that_were_left():
    events = [*published(1, 2, 3), started(1), promoted(2, 1), promoted(3, 2)]

    events.append(rollback_from(state_of(events), None, "guard", 9.0))
    state = state_of(events)

    assert events[-1] == RolledBack(time_s=9.0, from_version=3, to_version=2, by="guard", barred_digest="d3")
    assert (state.incumbent, state.previous, state.barred) == (2, 1, frozenset({"d3"}))
    assert state.num_promotions == 2


def test_rolling_back_twice_walks_back_twice():
    events = [*published(1, 2, 3), started(1), promoted(2, 1), promoted(3, 2)]

    for _ in range(2):
        events.append(rollback_from(state_of(events), None, "operator", 9.0))
    state = state_of(events)

    assert (state.incumbent, state.previous, state.barred) == (1, None, frozenset({"d2", "d3"}))
    with pytest.raises(VersionError, match="--to N"):
        rollback_from(state, None, "operator", 9.0)


def test_an_operator_who_rolls_forward_to_barred_weights_unbars_them_and_bars_nothing():
    events = [*published(1, 2, 3), started(1), promoted(2, 1), promoted(3, 2)]
    events.append(rollback_from(state_of(events), None, "guard", 9.0))

    events.append(rollback_from(state_of(events), 3, "operator", 10.0))
    state = state_of(events)

    assert (state.incumbent, state.previous, state.barred) == (3, 2, frozenset())


def test_a_plain_rollback_never_returns_to_barred_weights():
    # Version 1 was never in service: going there leaves the barred 3 below it.
    events = [*published(1, 2, 3), started(3)]
    events.append(rollback_from(state_of(events), 1, "operator", 9.0))

    assert state_of(events).incumbent == 1
    assert state_of(events).previous is None


@pytest.mark.parametrize(
    ("events", "to_version", "said"), [([], 1, "no version is in service"), ([started(1)], 1, "already")]
)
def test_a_rollback_that_leads_nowhere_is_refused(events, to_version, said):
    with pytest.raises(VersionError, match=said):
        rollback_from(state_of(events), to_version, "operator", 9.0)
