"""The operator's commands as typed, against a stand-in server that speaks the real wire."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from onlinespec.cli import app
from onlinespec.config import Config
from onlinespec.errors import OnlinespecError, StartError, SwapError, VersionError, WireError
from onlinespec.launch import Launch, holding
from onlinespec.paths import RunPaths
from onlinespec.promote import Promoter
from onlinespec.versions.journal import (
    AnyEvent,
    CanaryEnded,
    DepthChanged,
    GuardTripped,
    Journal,
    Judged,
    Paused,
    Pinned,
    PrefixesRenewed,
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
from onlinespec.versions.state import state_of
from onlinespec.versions.store import VersionStore
from onlinespec.wire.messages import GetHello, Hello, Swap
from onlinespec.wire.sockets import ControlClient
from tests.draft.tiny import build_draft
from tests.fake_server import PROVENANCE, TARGET, FakeServer, lay_out, publish

RUNNER = CliRunner()


@pytest.fixture
def stopped(tmp_path: Path) -> RunPaths:
    """The run directory of a server that was stopped."""
    return lay_out(tmp_path / "run")


@pytest.fixture
def paths(stopped: RunPaths) -> Iterator[RunPaths]:
    """The same while its server lives."""
    with holding(stopped):
        yield stopped


@pytest.fixture
def server(paths: RunPaths) -> FakeServer:
    return FakeServer(paths, 3)


def order(paths: RunPaths, *words: str) -> Result:
    return RUNNER.invoke(app, [*words, "--run-dir", str(paths.root)])


def told(paths: RunPaths, *words: str) -> str:
    """The one line that an order which succeeds prints."""
    done = order(paths, *words)
    assert done.exit_code == 0, done.exception
    assert done.stdout.count("\n") == 1
    return done.stdout.strip()


def refused(paths: RunPaths, *words: str) -> OnlinespecError:
    """The error, which `main` prints in one line with exit code 1."""
    done = order(paths, *words)
    assert isinstance(done.exception, OnlinespecError), done.output
    assert "\n" not in str(done.exception)
    return done.exception


def written(paths: RunPaths, since: int) -> list[AnyEvent]:
    """What the journal gained, without the times."""
    return [msgspec.structs.replace(event, time_s=0.0) for event in Journal(paths).read()[since:]]


def num_events(paths: RunPaths) -> int:
    return len(Journal(paths).read())


def digest_of(paths: RunPaths, version: int) -> str:
    return VersionStore(paths).manifest(version).digest


def test_promote_swaps_by_digest_and_writes_down_who_and_why(paths: RunPaths, server: FakeServer):
    before = num_events(paths)

    line = told(paths, "promote", "1", "--reason", "it was\n faster")

    assert line == "version 1 is in service; it was version 3"
    assert server.swaps == [Swap(1, str(paths.version(1)), digest_of(paths, 1))]
    promoted = Promoted(time_s=0.0, version=1, from_version=3, by="operator", reason="it was faster")
    assert written(paths, before) == [promoted]


def test_promote_bars_nothing_and_lifts_the_bar_of_what_it_names(paths: RunPaths, server: FakeServer):
    told(paths, "rollback")
    assert state_of(Journal(paths).read()).barred == {digest_of(paths, 3)}

    told(paths, "promote", "3")

    state = state_of(Journal(paths).read())
    assert (state.incumbent, state.barred, state.num_promotions) == (3, frozenset(), 2)


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (("promote", "2"), "version 2 is in service already; nothing was changed"),
        (("rollback", "--to", "2"), "version 2 is in service already; nothing was changed"),
        (("pin", "2"), "version 2 is pinned already; nothing was changed"),
        (("pin", "3"), "version 3 is pinned already; nothing was changed"),
        (("pause",), "the gate is paused already; nothing was changed"),
    ],
)
def test_an_order_given_twice_says_so_and_writes_and_swaps_once(
    paths: RunPaths, server: FakeServer, first: tuple[str, ...], again: str
):
    told(paths, *first)
    before, num_swaps = num_events(paths), len(server.swaps)

    assert told(paths, *first, "--reason", "again") == again

    assert num_events(paths) == before
    assert len(server.swaps) == num_swaps <= 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("unpin",), "no version is pinned; nothing was changed"),
        (("resume",), "the gate is not paused; nothing was changed"),
    ],
)
def test_taking_back_what_was_not_ordered_says_so_and_writes_nothing(paths: RunPaths, words: tuple[str], line: str):
    before = num_events(paths)

    assert told(paths, *words) == line

    assert num_events(paths) == before


def test_rollback_goes_one_further_back_each_time_until_nothing_was_before(paths: RunPaths, server: FakeServer):
    first = told(paths, "rollback", "--reason", "slow")
    second = told(paths, "rollback")

    assert first == "version 2 is in service; it was version 3, which the gate will not promote again"
    assert second.startswith("version 1 is in service")
    assert "nothing was in service before version 1" in str(refused(paths, "rollback"))
    back = [event for event in Journal(paths).read() if isinstance(event, RolledBack)]
    assert [(event.to_version, event.by, event.reason) for event in back] == [
        (2, "operator", "slow"),
        (1, "operator", ""),
    ]


def test_pin_puts_the_version_in_service_first(paths: RunPaths, server: FakeServer):
    before = num_events(paths)

    line = told(paths, "pin", "2", "--reason", "audit")

    assert line == "version 2 is in service; it was version 3; it is pinned, and stays until `onlinespec unpin`"
    assert written(paths, before) == [
        Promoted(time_s=0.0, version=2, from_version=3, by="operator", reason="audit"),
        Pinned(time_s=0.0, version=2, reason="audit"),
    ]
    assert state_of(Journal(paths).read()).protected == {1, 2, 3}


@pytest.mark.parametrize("words", [("promote", "2"), ("rollback",), ("rollback", "--to", "2"), ("pin", "2")])
def test_while_a_version_is_pinned_no_other_comes_into_service(
    paths: RunPaths, server: FakeServer, words: tuple[str, ...]
):
    told(paths, "pin", "3")
    before = num_events(paths)

    error = refused(paths, *words)

    assert re.match(r"version 3 is pinned and .* cannot be put in service; run `onlinespec unpin` first$", str(error))
    assert (num_events(paths), server.swaps) == (before, [])
    told(paths, "unpin", "--reason", "done")
    told(paths, *words)
    assert server.version == 2
    assert Unpinned(time_s=0.0, version=3, reason="done") in written(paths, before)


def test_pause_and_resume_are_written_without_asking_the_server(paths: RunPaths):
    before = num_events(paths)

    told(paths, "pause", "--reason", "release day")
    told(paths, "resume")

    assert written(paths, before) == [Paused(time_s=0.0, reason="release day"), Resumed(time_s=0.0)]


def test_a_server_that_refuses_changes_nothing(paths: RunPaths, server: FakeServer):
    server.refusal = "another d2t"
    before = num_events(paths)

    for words in (("promote", "1"), ("rollback",), ("pin", "1")):
        error = refused(paths, *words)
        assert isinstance(error, SwapError)
        assert "another d2t" in str(error)

    assert num_events(paths) == before


def test_damaged_weights_are_refused_before_the_server_is_asked(paths: RunPaths, server: FakeServer):
    (paths.version(2) / "model.safetensors").write_bytes(b"other")

    for words in (("promote", "2"), ("rollback", "--to", "2"), ("rollback",), ("pin", "2")):
        error = refused(paths, *words)
        assert isinstance(error, VersionError)
        assert "the file is damaged" in str(error)

    assert server.swaps == []


@pytest.mark.parametrize("words", [("promote", "4"), ("rollback", "--to", "4"), ("pin", "4")])
def test_a_version_of_another_target_is_refused_with_found_wanted_and_the_way_out(
    paths: RunPaths, server: FakeServer, words: tuple[str, ...]
):
    publish(paths, None, target_digest="b" * 64)
    before = num_events(paths)

    error = refused(paths, *words)

    assert str(error) == (
        "version 4 was trained for target bbbbbbbbbbbb, the server has target aaaa; name a version of this target,"
        " or serve that target in another run directory"
    )
    assert (server.swaps, num_events(paths)) == ([], before)


def test_after_the_target_changed_only_versions_of_the_new_one_come_into_service(paths: RunPaths, server: FakeServer):
    Journal(paths).append(TargetChanged(time_s=3.0, from_digest=TARGET, to_digest="bbbb"))
    publish(paths, 3, target_digest="bbbb")

    assert "the server has target bbbb" in str(refused(paths, "promote", "2"))
    assert "nothing was in service before version 3" in str(refused(paths, "rollback"))
    told(paths, "promote", "4")

    assert server.version == 4


def test_a_version_that_is_not_there_is_refused_with_those_that_are(paths: RunPaths, server: FakeServer):
    assert "version 9 is not in" in str(refused(paths, "promote", "9"))
    assert "it holds 1, 2, 3" in str(refused(paths, "pin", "9"))


def test_a_version_that_a_crash_kept_from_the_journal_is_entered_when_it_comes_into_service(
    paths: RunPaths, server: FakeServer
):
    publish(paths, 3)
    kept = paths.journal.read_bytes().splitlines(keepends=True)[:-1]
    paths.journal.write_bytes(b"".join(kept))

    told(paths, "promote", "4")

    state = state_of(Journal(paths).read())
    assert (state.incumbent, state.digests[4], state.parents[4]) == (4, digest_of(paths, 4), 3)


def test_a_server_that_serves_another_version_than_the_journal_says_is_put_right_without_an_event(
    paths: RunPaths, server: FakeServer
):
    server.version = 2
    before = num_events(paths)

    assert told(paths, "promote", "3") == "version 3 is in service"

    assert (server.version, num_events(paths)) == (3, before)


def test_a_pin_that_the_server_does_not_keep_is_put_right_without_an_event(paths: RunPaths, server: FakeServer):
    told(paths, "pin", "3")
    server.version = 2
    before = num_events(paths)

    told(paths, "pin", "3")

    assert (server.version, num_events(paths)) == (3, before)


def test_a_server_that_lives_and_does_not_answer_is_an_error(paths: RunPaths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onlinespec.operate._ANSWER_S", 0.1)

    assert isinstance(refused(paths, "promote", "1"), WireError)


@pytest.mark.parametrize("words", [("promote", "1"), ("pause",), ("history",), ("pin", "1"), ("rollback",)])
def test_a_directory_that_is_no_run_directory_is_an_error(tmp_path: Path, words: tuple[str, ...]):
    assert isinstance(refused(RunPaths(tmp_path), *words), StartError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "is_pinned"), [(("promote", "1"), False), (("rollback", "--to", "1"), False), (("pin", "1"), True)]
)
def test_a_stopped_server_starts_with_the_version_an_operator_named(
    stopped: RunPaths, words: tuple[str, ...], is_pinned: bool
):
    line = told(stopped, *words)

    assert line.startswith("version 1 goes into service when the server starts again; it was version 3")
    incumbent = VersionStore(stopped).incumbent_for(TARGET)
    assert incumbent is not None
    assert incumbent.manifest.version == 1
    assert (state_of(Journal(stopped).read()).pinned == 1) == is_pinned
    assert "already; nothing was changed" in told(stopped, *words)


def test_status_shows_the_pin_and_the_pause_with_their_reasons(paths: RunPaths, server: FakeServer):
    assert "gate      on\n" in order(paths, "status").stdout

    told(paths, "pin", "3", "--reason", "audit")
    told(paths, "pause")

    assert "gate      version 3 is pinned (audit), paused\n" in order(paths, "status").stdout


def test_status_shows_who_drafts_how_deep_and_what_a_step_costs(paths: RunPaths, server: FakeServer):
    server.switchback = 7
    server.counters = {"rows": 5} | {
        f"decode_{what}_{key}": count
        for key, counts in {"d0_b1": (10, 10, 10, 200_000), "d3_b4": (2, 14, 7, 117_000)}.items()
        for what, count in zip(("steps", "tokens", "requests", "us"), counts, strict=True)
    }
    paths.sidecar_status.write_text(
        json.dumps({"time_s": 0.0, "guard": {"aged": {"requests": 3, "mean_tokens": -0.012}}, "server_rows": 5})
    )

    shown = order(paths, "status").stdout

    assert "draft     version 3, 3 draft steps, in turns with version 7, which is on trial, 0 swaps since" in shown
    assert "tap       rows 5\n" in shown
    assert "steps     depth 0: 20 ms, 1.00 tokens at 1 running\n" in shown
    assert "steps     depth 3: 58.5 ms, 2.00 tokens at 3 to 4 running\n" in shown
    assert "  guard                 aged (requests 3, mean_tokens -0.012)\n" in shown
    assert "server_rows" not in shown


def promoter(paths: RunPaths) -> Promoter:
    launch = Launch("m", "d", 1, TARGET, "127.0.0.1", 1, 3, 128, os.getpid())
    control = ControlClient(paths.control_endpoint)
    hello = control.request(GetHello())
    assert isinstance(hello, Hello)
    return Promoter(paths, Config(), launch, control, hello, torch.zeros(29, 16), lambda _: False)


def test_a_paused_gate_starts_no_race_over_a_restart_of_the_sidecar_too(paths: RunPaths, server: FakeServer):
    running, weights = promoter(paths), build_draft(seed=9).weights()
    told(paths, "pause")

    restarted = promoter(paths)
    for gate in (running, restarted):
        gate.freeze(weights, PROVENANCE)
        assert gate.race is None
    told(paths, "resume")
    running.freeze(weights, PROVENANCE)

    assert running.race is not None


@pytest.mark.parametrize(
    ("words", "reason"), [(("pin", "3"), "version 3 is pinned"), (("pause",), "the gate is paused")]
)
def test_a_race_that_is_won_under_a_hold_promotes_nothing_and_says_why(
    paths: RunPaths, server: FakeServer, words: tuple[str, ...], reason: str
):
    gate = promoter(paths)
    gate.freeze(build_draft(seed=9).weights(), PROVENANCE)
    assert gate.race is not None
    won = msgspec.structs.replace(gate.race.withdraw("better", now_s=2.0), decision="promote")
    told(paths, *words)
    before = num_events(paths)

    gate._conclude(won)

    judged, withheld = written(paths, before)
    assert isinstance(judged, Judged)
    assert withheld == Withheld(time_s=0.0, candidate_digest=judged.candidate_digest, reason=reason)
    assert server.swaps == []
    assert VersionStore(paths).latest() == 3


VERDICT = {
    "decision": "promote",
    "reason": "better than 0.02",
    "num_requests": 56,
    "mean_gain_tokens": 0.1234,
    "e_value": 310.0,
    "threshold": 120.0,
    "accept_length_incumbent": 2.31,
    "accept_length_candidate": 2.44,
}
TOLD: list[tuple[AnyEvent, str]] = [
    (Published(time_s=0, version=1, digest="d" * 64), "published      version 1, weights dddddddddddd"),
    (
        Published(time_s=0, version=4, digest="d" * 64, parent=3),
        "published      version 4, weights dddddddddddd, trained from version 3",
    ),
    (RaceStarted(time_s=0, candidate_digest="c" * 64, alpha=0.0083), "candidate      cccccccccccc at alpha 0.0083"),
    (
        Judged(time_s=0, candidate_digest="c" * 64, verdict=VERDICT),
        "gate: promote  cccccccccccc: gain +0.123 tokens over 56 requests; e-value 310 of 120 wanted;"
        " accept length 2.31 -> 2.44; better than 0.02",
    ),
    (Judged(time_s=0, candidate_digest="c" * 64, verdict={"decision": "drop"}), "gate: drop     cccccccccccc"),
    (
        Withheld(time_s=0, candidate_digest="c" * 64, reason="version 3 is pinned"),
        "withheld       cccccccccccc was not promoted: version 3 is pinned",
    ),
    (
        Promoted(time_s=0, version=2, from_version=1, by="gate"),
        "in service     version 2 instead of 1, by the gate",
    ),
    (
        Promoted(time_s=0, version=2, from_version=None, by="operator", reason="faster"),
        "in service     version 2, by the operator: faster",
    ),
    (
        RolledBack(time_s=0, from_version=3, to_version=2, by="guard", barred_digest="b" * 64, reason="slow"),
        "rolled back    version 3 to 2, weights bbbbbbbbbbbb barred, by the guard: slow",
    ),
    (
        RolledBack(time_s=0, from_version=3, to_version=2, by="serve", barred_digest=None),
        "rolled back    version 3 to 2, by `serve` at its start",
    ),
    (SwapFailed(time_s=0, version=3, reason="shape"), "swap failed    version 3: shape"),
    (ServerStarted(time_s=0, version=3), "started        on version 3"),
    (
        CanaryEnded(
            time_s=0,
            version=4,
            decision="harm",
            evidence={"mean_difference_tokens": -0.31, "num_pairs": 12, "step_cost_ratio": 1.0234},
        ),
        "canary         version 4: harm: difference -0.310 tokens over 12 pairs; step cost x 1.023",
    ),
    (
        # The gate's own words name the same numbers.
        CanaryEnded(time_s=0, version=4, decision="harm", evidence={"num_pairs": 12, "reason": "-0.3 tokens"}),
        "canary         version 4: harm: -0.3 tokens",
    ),
    (CanaryEnded(time_s=0, version=4, decision="pass", evidence={}), "canary         version 4: pass"),
    (
        PrefixesRenewed(time_s=0, version=4, lag_tokens=-0.31),
        "prefixes       computed anew for version 4: live accept length -0.310 tokens from the shadow's"
        " on older drafts' KV",
    ),
    (
        GuardTripped(
            time_s=0,
            version=3,
            detector="quality",
            evidence={
                "mean_tokens": -0.2,
                "num_requests": 40,
                "evidence": 1234.0,
                "threshold": 1000.0,
                "reason": "below its parent",
            },
        ),
        "guard          version 3: harm (quality); difference -0.200 tokens over 40 requests;"
        " evidence 1.23e+03 of 1e+03 wanted; below its parent",
    ),
    (
        DepthChanged(time_s=0, num_steps=0, by="floor", reason="a step costs more than it brings"),
        "depth          0 draft steps, by the floor: a step costs more than it brings",
    ),
    (
        TargetChanged(time_s=0, from_digest="a" * 64, to_digest="b" * 64),
        "target changed aaaaaaaaaaaa to bbbbbbbbbbbb; what was shown before counts no more",
    ),
    (Pinned(time_s=0, version=3), "pinned         version 3, by the operator"),
    (Unpinned(time_s=0, version=3, reason="done"), "unpinned       version 3, by the operator: done"),
    (Paused(time_s=0, reason="release day"), "paused         the gate, by the operator: release day"),
    (Resumed(time_s=0), "resumed        the gate, by the operator"),
]


@pytest.mark.parametrize(("event", "line"), TOLD, ids=[type(event).__name__ for event, _ in TOLD])
def test_history_tells_each_event_in_one_line(stopped: RunPaths, event: AnyEvent, line: str):
    Journal(stopped).append(event)

    last = order(stopped, "history").stdout.splitlines()[-1]

    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  " + re.escape(line), last), last


def test_every_kind_of_event_has_its_line_here():
    kinds = {kind.__name__ for kind in AnyEvent.__args__}

    assert {type(event).__name__ for event, _ in TOLD} == kinds


def test_history_as_json_is_the_journal_line_by_line(paths: RunPaths, server: FakeServer):
    told(paths, "pin", "2", "--reason", "audit")

    lines = order(paths, "history", "--json").stdout.splitlines()

    assert [json.loads(line) for line in lines] == [json.loads(line) for line in paths.journal.read_text().splitlines()]
    assert json.loads(lines[-1])["reason"] == "audit"
