"""Arms, results that grow row by row, and the live stream."""

import contextlib
import json
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from onlinespec.bench.arms import ARMS, LIVE_ARMS, REPLAY_ARMS, parse_arm
from onlinespec.bench.client import Answer, Prompt
from onlinespec.bench.stream import LivePhase, LiveRow, LiveWindow, phase_of, summarise_live
from onlinespec.bench.stream_results import Results
from onlinespec.bench.stream_run import LivePlan, run_live
from onlinespec.bench.stream_serve import Server, free_port, our_command, serving, stock_command
from onlinespec.errors import BenchError, StartError
from onlinespec.resolve import load_config


class Row(msgspec.Struct):
    arm: str
    seed: int
    value: float


def test_every_arm_of_a_list_exists_and_its_settings_are_ones_the_config_knows():
    for name in {*REPLAY_ARMS, *LIVE_ARMS}:
        load_config([], ARMS[name].overrides)


def test_an_arm_may_carry_settings_of_its_own_and_keeps_them_in_its_name():
    arm = parse_arm("onlinespec trainer.loss=reverse_kl gate.min_requests=4")

    assert arm.name == "onlinespec trainer.loss=reverse_kl gate.min_requests=4"
    assert (arm.gate, arm.overrides) == ("race", ("trainer.loss=reverse_kl", "gate.min_requests=4"))


def test_settings_of_an_arm_come_after_those_it_has_anyway():
    config = load_config([], parse_arm("recipe trainer.unroll_steps=3").overrides)

    assert (config.trainer.unroll_steps, config.trainer.optimizer) == (3, "adamw")


@pytest.mark.parametrize(
    ("text", "told"),
    [("frosen", "'frosen': no such arm; wanted one of none, frozen"), ("frozen trainer.seed=1", "trains nothing")],
)
def test_an_arm_that_cannot_be_is_refused_by_name(text: str, told: str):
    with pytest.raises(BenchError, match=told):
        parse_arm(text)


def test_rows_are_on_disk_as_soon_as_they_are_put_and_are_found_again(tmp_path: Path):
    path = tmp_path / "r.json"
    Results(path, "a bench", {"tokens": 5}).put(Row("x", 1, 2.5), arm="x", seed=1)

    again = Results(path, "a bench", {"tokens": 5})

    found = again.find(arm="x", seed=1)
    assert found is not None
    assert (found["value"], again.find(arm="x", seed=2)) == (2.5, None)
    assert {"commit", "time"} <= found.keys()
    assert "command" in json.loads(path.read_text())["provenance"]


def test_a_row_takes_the_place_of_the_one_with_its_key(tmp_path: Path):
    results = Results(tmp_path / "r.json", "a bench", {})
    for value in (1.0, 2.0):
        results.put(Row("x", 1, value), arm="x", seed=1)
    results.put(Row("x", 2, 3.0), arm="x", seed=2)

    assert [row["value"] for row in results.rows] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("a bench", {"tokens": 6}, "was made with tokens 5, wanted 6; give another --json"),
        ("another", {"tokens": 5}, "holds 'a bench', wanted 'another'"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_left_alone(tmp_path: Path, kind: str, settings: dict, told: str):
    path = tmp_path / "r.json"
    Results(path, "a bench", {"tokens": 5}).put(Row("x", 1, 2.5), arm="x", seed=1)
    before = path.read_bytes()

    with pytest.raises(BenchError, match=told):
        Results(path, kind, settings)

    assert path.read_bytes() == before


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "r.json"
    path.write_text("{")

    with pytest.raises(BenchError, match=r"r\.json: no result of a bench"):
        Results(path, "a bench", {})


def ended(at_s: float, tokens: int, steps: int = 0, correct: int = 0, error: str = "") -> Answer:
    counters = {"num_output_tokens": tokens, "num_verify_steps": steps, "num_correct_drafts": correct}
    return Answer(Prompt.of_text("code", "?"), at_s - 1.0, chunk_s=[at_s], has_counters=True, **counters, error=error)


def test_an_arm_whose_server_tells_no_verify_steps_is_not_measured_and_told_why(tmp_path: Path, monkeypatch):
    plan = LivePlan(tmp_path / "r.json", tmp_path, "init", ("none", "frozen"), ("demo:code",), 4, 2, 8, 1, 2)

    async def drive(base_url, prompts, sampling, concurrency, on_answer):
        for number in range(len(prompts)):
            answer = ended(number + 1.0, 10)
            answer.has_counters = False
            on_answer(answer)

    @contextlib.contextmanager
    def server(plan, arm, console):
        yield Server("http://127.0.0.1:1", None, tmp_path / "s.log")

    monkeypatch.setattr("onlinespec.bench.stream_run.drive", drive)
    monkeypatch.setattr("onlinespec.bench.stream_run._server", server)
    run_live(plan, Console(quiet=True))

    told = {row["arm"]: row["error"] for row in json.loads(plan.out.read_text())["rows"]}
    assert told["none"] == ""
    assert "its server tells no verify steps" in told["frozen"]


def test_a_phase_is_cut_into_windows_of_answers_in_the_order_they_ended():
    answers = [ended(3.0, 30), ended(2.0, 20), ended(7.0, 40), ended(5.0, 10), ended(9.0, 50), ended(1.0, 9, error="x")]

    phase = phase_of("code", answers, window_requests=2)

    # Began at 1.0, when the answer that ended at 2.0 was sent; the fifth fills no window.
    assert [(window.num_tokens, window.seconds) for window in phase.windows] == [(50, 2.0), (50, 4.0)]
    assert (phase.summary.num_requests, phase.summary.num_failed, len(phase.requests)) == (6, 1, 5)


def arm_row(arm: str, speeds: list[float], lengths: list[float]) -> LiveRow:
    windows = [
        LiveWindow(int(1000 * speed), 1000, int(1000 * (length - 1)), 1000.0)
        for speed, length in zip(speeds, lengths, strict=True)
    ]
    return LiveRow(arm, True, "", [LivePhase("code", phase_of("code", [], 1).summary, windows, [])], 0)


def test_arms_are_compared_window_by_window():
    rows = [
        arm_row("none", [100.0, 100.0, 100.0, 100.0], [1.0] * 4),
        arm_row("frozen", [90.0, 80.0, 80.0, 80.0], [1.5] * 4),
        arm_row("onlinespec", [90.0, 80.0, 160.0, 160.0], [1.5, 1.5, 2.5, 2.5]),
    ]

    lines = {(line.part, line.arm): line for line in summarise_live(rows)}

    whole, half = lines["whole", "onlinespec"], lines["last half", "onlinespec"]
    assert whole.over_frozen is not None
    assert whole.over_frozen.mean == pytest.approx(2.0**0.5)
    assert half.over_frozen is not None
    assert half.over_none is not None
    assert half.gain_over_frozen is not None
    assert (half.over_frozen.mean, half.over_none.mean) == (pytest.approx(2.0), pytest.approx(1.6))
    assert (half.gain_over_frozen.mean, half.accept_length.mean) == (pytest.approx(1.0), 2.5)
    assert (lines["whole", "none"].over_none, lines["whole", "frozen"].over_frozen) == (None, None)


def test_an_arm_that_was_cut_short_is_shown_and_compared_with_nothing():
    lines = summarise_live([arm_row("frozen", [90.0, 80.0], [1.5, 1.5]), arm_row("onlinespec", [90.0], [1.5])])

    found = next(line for line in lines if line.arm == "onlinespec")
    assert (found.over_frozen, found.gain_over_frozen, found.tokens_per_s.mean) == (None, None, 90.0)


def test_every_arm_s_server_gets_the_same_target_and_depth():
    stock = stock_command(Path("m"), 1, Path("d"), 5, True, ["--tp-size", "2"])
    plain = stock_command(Path("m"), 1, None, 5, False, [])
    ours = our_command(Path("m"), 1, "init", Path("r"), 5, [Path("c.yaml")], ["a.b=1"], ["--tp-size", "2"])

    assert "--speculative-adaptive" in stock
    assert not any("speculative" in word for word in plain)
    for command in (stock, ours):
        assert command[command.index("--speculative-num-steps") + 1] == "5"
        assert command[command.index("--speculative-num-draft-tokens") + 1] == "6"
        assert command[-2:] == ["--tp-size", "2"]
    assert ours[ours.index("--set") + 1] == "a.b=1"


def test_a_server_that_does_not_start_is_reported_with_its_last_words(tmp_path: Path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]

    with (
        pytest.raises(StartError, match=r"status 3\): no such model; see .*s\.log"),
        serving(command, free_port(), tmp_path / "s.log"),
    ):
        pass


def test_an_arm_whose_server_does_not_start_is_told_of_and_the_others_go_on(tmp_path: Path, monkeypatch):
    plan = LivePlan(tmp_path / "r.json", tmp_path, "init", ("none", "frozen"), ("demo:code",), 4, 2, 8, 1, 2)

    @contextlib.contextmanager
    def server(plan, arm, console):
        if arm.name == "none":
            raise StartError("no memory")
        yield Server("http://127.0.0.1:1", None, tmp_path / "s.log")

    async def drive(base_url, prompts, sampling, concurrency, on_answer):
        for number in range(len(prompts)):
            on_answer(ended(number + 1.0, 10, 5, 5))

    monkeypatch.setattr("onlinespec.bench.stream_run.drive", drive)
    monkeypatch.setattr("onlinespec.bench.stream_run._server", server)
    is_whole = run_live(plan, Console(quiet=True))

    rows = json.loads(plan.out.read_text())["rows"]
    assert not is_whole
    assert [(row["arm"], row["is_complete"], row["error"]) for row in rows] == [
        ("none", False, "no memory"),
        ("frozen", True, ""),
    ]


def test_an_arm_whose_server_dies_leaves_what_it_answered_and_is_played_again(tmp_path: Path, monkeypatch):
    answered = [ended(float(i), 10, 5, 5) for i in range(1, 5)]
    plan = LivePlan(tmp_path / "r.json", tmp_path, "init", ("frozen",), ("demo:code",), 4, 2, 8, 1, window_requests=2)
    is_dying = True

    async def drive(base_url, prompts, sampling, concurrency, on_answer):
        for answer in answered[: 2 if is_dying else 4] if len(prompts) == 4 else []:
            on_answer(answer)
        if is_dying and len(prompts) == 4:
            on_answer(ended(9.0, 0, error="APIConnectionError: gone"))

    @contextlib.contextmanager
    def server(*_):
        yield Server("http://127.0.0.1:1", None, tmp_path / "s.log")

    monkeypatch.setattr("onlinespec.bench.stream_run.drive", drive)
    monkeypatch.setattr("onlinespec.bench.stream_run._server", server)
    is_first_whole = run_live(plan, Console(quiet=True))
    first = json.loads(plan.out.read_text())["rows"]
    is_dying = False
    is_second_whole = run_live(plan, Console(quiet=True))
    second = json.loads(plan.out.read_text())["rows"]

    assert (is_first_whole, is_second_whole) == (False, True)
    assert "1 of 4 requests failed, the first with APIConnectionError: gone" in first[0]["error"]
    assert [len(row["phases"][0]["requests"]) for row in (*first, *second)] == [2, 4]
