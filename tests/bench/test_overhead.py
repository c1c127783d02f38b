"""The blocks of `bench overhead` and what they come to; the switch, on a process that stands in for a sidecar."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from onlinespec.bench import overhead_run
from onlinespec.bench.client import Answer, Prompt, Sampling
from onlinespec.bench.overhead import Block, Load, block_order, measured, summarise_overhead, swap_gaps, warm_up
from onlinespec.bench.overhead_gaps import compare, gaps_of
from onlinespec.bench.overhead_run import OverheadPlan, plot, table
from onlinespec.bench.overhead_toggle import STATES, Toggle, find_sidecar, toggling
from onlinespec.errors import BenchError
from onlinespec.launch import read_launch, write_launch
from onlinespec.versions.journal import Journal
from onlinespec.versions.state import state_of
from onlinespec.wire.messages import Ack, Heartbeat, SetCapture
from onlinespec.wire.sockets import SampleSender
from tests.fake_server import FakeServer, lay_out


def answer(chunk_s: list[float], tokens: int) -> Answer:
    return Answer(Prompt.of_text("code", "?"), chunk_s[0] - 1.0, chunk_s=chunk_s, num_output_tokens=tokens)


def block(state: str, pair: int, speed: float = 100.0, gap_s: float = 0.1, **changes) -> Block:
    values = {"num_rows": 10, "num_bytes": 200, "num_dropped_rows": 0, "optimizer_steps": 0} | changes
    return Block(state, pair, 0.0, 8.0, **values, tokens_per_s=speed, gap_p99_s=gap_s, num_gaps=50)


def test_every_state_comes_as_often_before_each_other_as_after_it():
    order = list(block_order(range(4)))

    assert [state for _, state in order[:6]] == ["off", "tap", "training", "training", "tap", "off"]
    for first, second in itertools.combinations(STATES, 2):
        places = [[state for pair, state in order if pair == number] for number in range(4)]
        assert sum(pair.index(first) < pair.index(second) for pair in places) == 2


def test_a_block_has_the_tokens_of_its_chunks_and_the_gaps_that_lie_in_it():
    blocks = [msgspec.structs.replace(block("off", 0), began_s=10.0, ended_s=20.0)]
    answers = [answer([9.0, 11.0, 12.0, 21.0], 8), answer([10.0, 19.5, 22.0], 6)]
    answers[1].chunk_tokens = [1, 4, 6]

    found = measured(blocks, answers)[0]

    # 2 of 4 chunks of 8 tokens, then 1 and 3 tokens; gaps 11 to 12 and 10 to 19.5, the others reach out of the block.
    assert found.tokens_per_s == pytest.approx((4 + 1 + 3) / 10)
    assert (found.num_gaps, found.gap_p99_s) == (2, 9.5)


def test_ratios_are_over_pairs_and_pairs_that_lack_a_block_are_left_out():
    blocks = [block("off", 0, 100), block("tap", 0, 90), block("off", 1, 200), block("tap", 1, 180), block("off", 2)]

    found = summarise_overhead(blocks, None)

    assert [(ratio.over, ratio.under) for ratio in found.ratios] == [("tap", "off")]
    speed = found.ratios[0].tokens_per_s
    assert (speed.mean, speed.low, speed.num_values) == (pytest.approx(0.9), pytest.approx(0.9), 2)


def test_bytes_drops_and_steps_are_counted():
    blocks = [
        block("tap", 0, num_rows=30, num_bytes=600, num_dropped_rows=10),
        block("training", 0, num_rows=10, num_bytes=200, optimizer_steps=4),
        block("off", 0, num_rows=0, num_bytes=0),
    ]

    found = summarise_overhead(blocks, None)

    assert found.bytes_per_row == 20.0
    assert found.dropped_frac == {"off": None, "tap": 0.25, "training": 0.0}
    assert found.optimizer_steps_per_s == 0.5


def test_gaps_are_of_answers_within_the_span_and_at_a_window_where_they_meet_it():
    gaps = gaps_of([[0.0, 1.0, 2.0, 5.0], [1.5, 1.6]], (0.5, 10.0))

    found = compare(gaps, [(1.8, 1.9)], (0.5, 10.0))

    assert gaps.tolist() == [[1.0, 2.0], [2.0, 5.0], [1.5, 1.6]]
    assert (found["at"]["gaps"], found["at"]["ms"]["longest"]) == (1, 1000.0)
    assert (found["away"]["gaps"], found["away"]["ms"]["longest"]) == (2, 3000.0)


def test_a_window_that_met_no_gap_is_no_error():
    found = compare(np.array([[1.0, 2.0]]), [(5.0, 5.1)], (0.0, 10.0))

    assert found["at"] == {"gaps": 0}
    assert swap_gaps([], [(1.0, 2.0)], (0.0, 3.0)) is None


def test_what_was_measured_is_shown_and_drawn(tmp_path: Path):
    blocks = [block(state, pair) for pair in range(2) for state in STATES]
    swaps = compare(np.array([[1.0, 2.0], [3.0, 4.0]]), [(1.5, 1.6)], (0.0, 10.0))

    plot(blocks, tmp_path / "p.png")

    assert table(summarise_overhead(blocks, swaps)).row_count == 4
    assert (tmp_path / "p.png").stat().st_size > 0


class SteadyLoad:
    """Two answers whose chunks fill the first hundred seconds."""

    def __init__(self, *_args) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> list[Answer]:
        return [answer([number / 10 for number in range(1000)], 1000)] * 2


def test_a_run_that_was_stopped_goes_on_behind_its_last_whole_pair(tmp_path: Path, monkeypatch):
    asked: list[list[int]] = []

    def play(_toggle, _load, pairs, _block_s, on_block) -> None:
        asked.append(list(pairs))
        for number, (pair, state) in enumerate(block_order(asked[-1])):
            if len(asked) == 1 and number == 5:
                raise KeyboardInterrupt
            began_s = 8.0 * number
            on_block(msgspec.structs.replace(block(state, pair), began_s=began_s, ended_s=began_s + 8.0))

    monkeypatch.setattr(overhead_run, "_server", lambda *_: contextlib.nullcontext(tmp_path))
    monkeypatch.setattr(overhead_run, "toggling", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(overhead_run, "Load", SteadyLoad)
    monkeypatch.setattr(overhead_run, "warm_up", lambda *_: None)
    monkeypatch.setattr(overhead_run, "run_blocks", play)
    lay_out(tmp_path)
    out, console = tmp_path / "o.json", Console(quiet=True)
    plan = OverheadPlan(out, tmp_path, tmp_path, "init", "demo", 3, 8.0, 0, 4, 200)

    ended = [overhead_run.run_overhead(plan, console) for _ in range(3)]

    written = json.loads(out.read_text())
    assert ended == [False, True, True]
    assert asked == [[0, 1, 2], [1, 2]], "the third time nothing is left"
    assert [row["pair"] for row in written["rows"]] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (written["is_whole"], written["summary"]["ratios"][0]["tokens_per_s"]["num_values"]) == (True, 3)


class CapturingServer(FakeServer):
    """Remembers what capture was set to."""

    def __init__(self, *args):
        self.captures: list[bool | None] = []
        super().__init__(*args)

    def _answer(self, request):
        if isinstance(request, SetCapture):
            self.captures.append(request.enabled)
            return Ack(True, "", self.version)
        return super()._answer(request)


@pytest.fixture
def sidecar() -> Iterator[subprocess.Popen]:
    """A child of ours whose command line names the sidecar, as `python -m onlinespec.sidecar` does."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "onlinespec.sidecar"])
    yield process
    process.kill()
    process.wait()


def state_of_process(pid: int) -> str:
    """One letter, as ps has it: T is stopped."""
    time.sleep(0.05)
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_the_sidecar_is_found_among_the_children_of_serve(sidecar: subprocess.Popen):
    assert find_sidecar(os.getpid()) == sidecar.pid


def test_each_state_sets_capture_and_stops_or_lets_run_the_sidecar(tmp_path: Path, sidecar: subprocess.Popen):
    paths = lay_out(tmp_path)
    server = CapturingServer(paths, 3)
    toggle = Toggle(tmp_path, sidecar.pid)

    seen = []
    for state in STATES:
        toggle.set(state)
        seen.append((server.captures[-1], state_of_process(sidecar.pid) == "T"))

    assert seen == [(False, True), (True, True), (True, False)]


def test_the_tap_s_rows_are_received_and_thrown_away_and_none_is_owed_to_the_next_block(
    tmp_path: Path, sidecar: subprocess.Popen
):
    paths = lay_out(tmp_path)
    CapturingServer(paths, 3)
    toggle = Toggle(tmp_path, sidecar.pid)
    sender = SampleSender(paths.samples_endpoint, 1 << 20, lambda: 3)

    toggle.set("tap")
    for _ in range(100):
        sender.offer(Heartbeat(3, {}), [b"row"])
    deadline_s = time.monotonic() + 10
    while toggle.drain.num_messages < 100 and time.monotonic() < deadline_s:
        time.sleep(0.02)

    assert toggle.drain.num_messages >= 100  # the sender's own heartbeats too
    assert sender.counters["dropped_messages"] == 0
    toggle.set("training")
    assert toggle.drain is None


def test_afterwards_the_server_is_as_it_was_whatever_ended_the_bench(tmp_path: Path, sidecar: subprocess.Popen):
    paths = lay_out(tmp_path)
    server = CapturingServer(paths, 3)

    pinned = []

    def stopped_by_hand() -> None:
        with toggling(tmp_path) as toggle:
            toggle.set("off")
            pinned.append(state_of(Journal(paths).read()).pinned)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_by_hand()

    assert pinned == [3]
    assert state_of(Journal(paths).read()).pinned is None
    assert server.captures == [False, True]
    assert state_of_process(sidecar.pid) != "T"


def test_blocks_wait_for_a_sidecar_that_trains(tmp_path: Path, sidecar: subprocess.Popen, monkeypatch):
    CapturingServer(lay_out(tmp_path), 3)
    monkeypatch.setattr("onlinespec.bench.overhead._WARM_UP_S", 0.1)
    toggle, load = Toggle(tmp_path, sidecar.pid), Load("http://127.0.0.1:1", [], Sampling(), 1)
    load.check = lambda: None

    toggle.paths.sidecar_status.write_text('{"trainer_step": 3}')

    with pytest.raises(BenchError, match="made 3 optimizer steps in 0 s of traffic, wanted 8"):
        warm_up(toggle, load)
    toggle.paths.sidecar_status.write_text('{"trainer_step": 8}')
    warm_up(toggle, load)


def test_a_server_that_captures_nothing_is_refused(tmp_path: Path):
    paths = lay_out(tmp_path)
    write_launch(paths, msgspec.structs.replace(read_launch(tmp_path), capture_refused="trees"))

    with pytest.raises(BenchError, match="does not capture"), toggling(tmp_path):
        pass


def test_a_sidecar_that_died_is_told_of(tmp_path: Path, sidecar: subprocess.Popen):
    paths = lay_out(tmp_path)
    CapturingServer(paths, 3)
    sidecar.kill()
    sidecar.wait()

    with pytest.raises(BenchError, match=f"the sidecar, process {sidecar.pid}, is gone"):
        Toggle(tmp_path, sidecar.pid).set("tap")
