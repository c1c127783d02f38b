"""`bench accept` against a stand-in server: the grid, what is kept when it is broken off, and how it goes on."""

import io
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from onlinespec.bench.accept import Plan, run_accept
from onlinespec.bench.client import Answer, Prompt
from onlinespec.bench.result import Result, Sample, read_result, summaries_of
from onlinespec.cli import app
from onlinespec.errors import BenchError
from onlinespec.launch import Launch, write_launch
from onlinespec.paths import RunPaths
from tests.bench.stand_in import StandIn, stand_in

NUM_PROMPTS = 6
WARMUP = "Count from"


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = ({"prompt": f"p{n}", "domain": "even" if n % 2 == 0 else "odd"} for n in range(NUM_PROMPTS))
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def plan(server: StandIn, prompts: Path, **changes) -> Plan:
    asked = {
        "base_url": server.url,
        "suites": [str(prompts)],
        "num_prompts": NUM_PROMPTS,
        "concurrencies": [1],
        "temperatures": [0.0],
        "max_tokens": 8,
        "seed": 1,
        "is_streamed": True,
        "num_warmup": 1,
        "is_flushed": False,
        "run_dir": None,
        "path": prompts.parent / "result.json",
    }
    return Plan(**asked | changes)


def run(wanted: Plan) -> tuple[int, str]:
    """Exit status, and what was shown."""
    console = Console(width=200, file=io.StringIO())
    status = run_accept(wanted, console)
    return status, console.file.getvalue()


def measured(server: StandIn) -> list[str]:
    """Prompts that reached the server, warm-up left out."""
    return [text for text in server.last_turns if not text.startswith(WARMUP)]


def good(domain: str, steps: int, correct: int) -> Answer:
    counters = {"num_output_tokens": 2, "num_verify_steps": steps, "num_correct_drafts": correct}
    return Answer(Prompt.of_text(domain, "Hello"), 0.0, chunk_s=[1.0], **counters)


def test_where_no_server_answers_the_address_is_named(prompts: Path, server: StandIn):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{probe.getsockname()[1]}"

    with pytest.raises(BenchError, match=rf"^{silent}: .*is the server running, and is this its address\?$"):
        run(plan(server, prompts, base_url=silent))


def test_there_is_a_row_per_domain_in_order_of_appearance_and_a_total():
    answers = [good("b", 1, 3), good("a", 3, 1), good("b", 1, 1)]

    rows = summaries_of(answers)

    assert [(row.name, row.accept_length) for row in rows] == [("b", 3.0), ("a", 4 / 3), ("all", 2.0)]
    assert [row.tokens_per_s for row in rows] == [None, None, 6.0], "domains that ran mixed have no speed of their own"


def test_a_single_domain_needs_no_total_and_no_answers_have_one():
    assert [row.name for row in summaries_of([good("a", 1, 0), good("a", 1, 0)])] == ["a"]
    assert [row.name for row in summaries_of([])] == ["all"]


def test_every_suite_is_asked_at_every_concurrency_and_temperature(server: StandIn, prompts: Path):
    grid = plan(server, prompts, suites=[str(prompts), "demo"], concurrencies=[1, 3], temperatures=[0.0, 0.5])

    status, shown = run(grid)

    result = read_result(grid.path)
    assert status == 0
    assert len(server.asked) == 8 * (NUM_PROMPTS + 1)
    assert [(cell.suite, cell.concurrency, cell.temperature) for cell in result.cells] == [
        (suite, users, heat) for suite in grid.suites for users in (1, 3) for heat in (0.0, 0.5)
    ]
    assert all(cell.is_complete and len(cell.samples) == NUM_PROMPTS for cell in result.cells)
    assert [row.name for row in result.cells[0].rows] == ["even", "odd", "all"]
    assert result.cells[0].rows[-1].accept_length == (3 + 4) / 3
    assert "3 users, temperature 0.5" in shown
    assert grid.path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_result_says_where_it_came_from_and_holds_no_prompt_and_no_answer(server: StandIn, prompts: Path):
    wanted = plan(server, prompts)

    run(wanted)

    (session,) = read_result(wanted.path).sessions
    text = wanted.path.read_text()
    assert session.server == {"version": "0.0", "speculative_num_steps": 2}
    assert session.versions["openai"]
    assert session.machine["cores"] > 0
    assert session.config_digest is None
    assert "p3" not in text
    assert "one two" not in text
    assert "secret" not in text


def test_a_server_that_does_not_speculate_has_every_figure_but_the_accept_length(server: StandIn, prompts: Path):
    server.has_counters = False

    status, shown = run(plan(server, prompts))

    (row,) = [row for row in read_result(prompts.parent / "result.json").cells[0].rows if row.name == "all"]
    assert status == 0
    assert "no accept length: the server sent no counters" in shown
    assert (row.accept_length, row.position_acceptance) == (None, [])
    assert row.tokens_per_s > 0
    assert row.ttft_p50_s > 0


def test_without_a_stream_there_is_an_accept_length_and_no_latency(server: StandIn, prompts: Path):
    run(plan(server, prompts, is_streamed=False))

    row = read_result(prompts.parent / "result.json").cells[0].rows[-1]
    assert row.accept_length == (3 + 4) / 3
    assert row.tokens_per_s > 0
    assert (row.ttft_p50_s, row.token_p50_s) == (None, None)


def test_the_prefix_cache_is_flushed_before_a_cell_where_asked_for(server: StandIn, prompts: Path):
    run(plan(server, prompts, concurrencies=[1, 2], is_flushed=True))

    assert server.flushes == 2


def test_a_server_that_dies_leaves_what_was_measured_and_the_same_command_goes_on(server: StandIn, prompts: Path):
    wanted, warmups = plan(server, prompts), 1
    server.dies_at = warmups + 4

    with pytest.raises(BenchError, match=r"the server is gone, in the middle of a request .*the same command to go on"):
        run(wanted)
    broken = read_result(wanted.path)
    server.is_dead, server.dies_at = False, 0
    server.asked.clear()
    status, _ = run(wanted)

    whole = read_result(wanted.path)
    assert not broken.cells[0].is_complete
    assert broken.cells[0].rows[-1].num_requests == 4
    assert broken.cells[0].rows[-1].num_failed == 1
    assert status == 0
    assert measured(server) == ["p3", "p4", "p5"], "the one it died in is asked again"
    assert sorted(sample.number for sample in whole.cells[0].samples) == list(range(NUM_PROMPTS))
    assert whole.cells[0].is_complete
    assert len(whole.sessions) == 2


def test_a_pause_between_two_sessions_is_not_in_the_speed(server: StandIn, prompts: Path):
    wanted = plan(server, prompts)
    server.dies_at = 4
    with pytest.raises(BenchError):
        run(wanted)
    kept = max(s.sent_s + s.done_s for s in read_result(wanted.path).cells[0].samples if not s.error)
    server.is_dead, server.dies_at = False, 0

    run(wanted)

    later = min(s.sent_s for s in read_result(wanted.path).cells[0].samples if s.number >= 2)
    assert kept <= later < kept + 5


@pytest.fixture
def terminal() -> Iterator[None]:
    """Ctrl-C as at a terminal: a shell starts what it puts in the background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_what_was_measured_and_says_so(server: StandIn, prompts: Path, terminal):
    wanted = plan(server, prompts, concurrencies=[1, 2])
    server.interrupts_at = 1 + 3

    status, shown = run(wanted)

    result = read_result(wanted.path)
    assert status == 130
    assert [len(cell.samples) for cell in result.cells] == [2, 0]
    assert "not complete: 2 requests were measured" in shown
    assert "the same command goes on with it" in shown.replace("\n", "")
    assert wanted.path.with_suffix(".png").exists()


def test_a_two_turn_conversation_is_two_requests_of_one_number(server: StandIn, tmp_path: Path):
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps({"question_id": 1, "category": "ducks", "turns": ["A", "B"]}))
    wanted = plan(server, path, suites=[f"mtbench:{path}"])

    run(wanted)
    server.asked.clear()
    run(wanted)

    assert [(s.number, s.turn) for s in read_result(wanted.path).cells[0].samples] == [(0, 0), (0, 1)]
    assert server.asked == [], "nothing was missing"
    assert len(read_result(wanted.path).sessions) == 1


def test_a_file_of_other_settings_is_refused_by_their_names_and_left_alone(server: StandIn, prompts: Path):
    wanted = plan(server, prompts)
    run(wanted)
    before = wanted.path.read_bytes()
    prompts.write_text(prompts.read_text().replace("p5", "p6"))

    with pytest.raises(BenchError) as caught:
        run(plan(server, prompts, max_tokens=9, concurrencies=[1, 2]))

    told = str(caught.value)
    assert "max_tokens 9 against 8" in told
    assert "concurrencies [1, 2] against [1]" in told
    assert f"suites [{prompts} of " in told, "the same path with other prompts in it"
    assert "seed" not in told
    assert wanted.path.read_bytes() == before


def test_requests_that_fail_while_the_server_lives_are_counted_and_the_rest_goes_on(server: StandIn, prompts: Path):
    server.refuses = {"p1"}

    status, shown = run(plan(server, prompts))

    row = read_result(prompts.parent / "result.json").cells[0].rows[-1]
    assert status == 0
    assert (row.num_requests, row.num_failed) == (NUM_PROMPTS, 1)
    assert "1 requests failed, the first with: BadRequestError" in shown


def test_where_every_request_fails_the_status_says_so(server: StandIn, prompts: Path):
    server.refuses = {f"p{n}" for n in range(NUM_PROMPTS)}

    status, _ = run(plan(server, prompts))

    assert status == 1


def test_a_sample_is_its_answer_again_without_the_texts():
    answer = Answer(
        Prompt("chat", ({"role": "user", "content": "Hello"},), number=3, turn=1),
        100.0,
        text="Bye",
        chunk_s=[100.5, 101.25],
        chunk_tokens=[1, 3],
        done_s=101.5,
        finish_reason="stop",
        num_output_tokens=3,
        num_verify_steps=2,
        num_correct_drafts=1,
        histogram=[1, 1],
        has_counters=True,
    )

    again = Sample.of(answer, began_s=90.0).answer()

    assert (again.prompt.number, again.prompt.turn, again.domain, again.text) == (3, 1, "chat", "")
    assert (again.sent_s, again.chunk_s, again.done_s) == (10.0, [10.5, 11.25], 11.5)
    assert (again.histogram, again.token_gaps_s) == (answer.histogram, answer.token_gaps_s)


def test_the_command_measures_the_demo_by_default_and_exits_with_its_status(server: StandIn, tmp_path: Path):
    path = tmp_path / "out.json"

    words = ["bench", "accept", "--base-url", server.url, "--requests", "2", "--concurrency", "1", "--concurrency", "2"]
    done = CliRunner().invoke(app, [*words, "--json", str(path)])

    result: Result = read_result(path)
    assert done.exit_code == 0, done.output
    assert [(cell.suite, cell.concurrency, cell.temperature) for cell in result.cells] == [
        ("demo", 1, 0),
        ("demo", 2, 0),
    ]
    assert result.settings.max_tokens == 256


def test_a_run_directory_of_another_server_is_refused(server: StandIn, prompts: Path, tmp_path: Path):
    paths = RunPaths(tmp_path / "run")
    paths.create()
    write_launch(paths, Launch("m", "d", 1, "aaaa", "127.0.0.1", 1, 3, 128, 0))

    with pytest.raises(BenchError, match=r"run is of the server on port 1, and .* is asked"):
        run(plan(server, prompts, run_dir=paths.root))
