"""`onlinespec record` as a user runs it, against the sidecar's own part of it: to the bound, Ctrl-C, --stop, killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from onlinespec.launch import Launch, write_launch
from onlinespec.paths import RunPaths
from onlinespec.record.live import LiveRecording
from onlinespec.record.manifest import RowFacts
from onlinespec.record.reader import Recording
from tests.draft.tiny import build_sample

FACTS = RowFacts(target_digest="aa", hidden_size=16, aux_layers=(2, 4, 5), teacher_top_k=4)
TIMEOUT_S = 60.0


class Sidecar:
    """Polls, records and reports as the sidecar's loop does, a sample every few milliseconds."""

    def __init__(self, paths: RunPaths):
        self.live = LiveRecording(paths.record_request, os.getpid(), FACTS, shard_bytes=10_000)
        self._paths = paths
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        number = 0
        while not self._is_done.wait(0.01):
            self.live.poll(time.time())
            self.live.add(build_sample(number))
            number += 1
            status = {"time_s": time.time(), "version": 1, "recording": msgspec.to_builtins(self.live.progress)}
            temporary = self._paths.sidecar_status.with_suffix(".tmp")
            temporary.write_text(json.dumps(status))
            temporary.rename(self._paths.sidecar_status)

    def __enter__(self) -> "Sidecar":
        self._thread.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._is_done.set()
        self._thread.join()


def launch(root: Path, capture_refused: str = "") -> RunPaths:
    paths = RunPaths(root)
    paths.create()
    write_launch(paths, Launch("m", "d", 1, "aa", "127.0.0.1", 1, 3, 128, os.getpid(), capture_refused))
    return paths


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return launch(tmp_path / "run")


@pytest.fixture
def sidecar(paths: RunPaths) -> Iterator[Sidecar]:
    with Sidecar(paths) as running:
        yield running


def start(paths: RunPaths, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "onlinespec.cli", "record", "--run-dir", str(paths.root), *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "200"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test run in a shell's background ignores SIGINT, and so would its children.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_until_running(sidecar: Sidecar) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while sidecar.live.progress is None or sidecar.live.progress.num_samples < 3:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_it_shows_the_progress_until_the_bound_is_reached(tmp_path: Path, paths: RunPaths, sidecar: Sidecar):
    command = start(paths, "--out", str(tmp_path / "rows"), "--max-gb", "0.0001")

    told, _ = command.communicate(timeout=TIMEOUT_S)

    assert command.returncode == 0, told
    assert f"{tmp_path}/rows: {len(Recording(tmp_path / 'rows'))} samples" in told
    assert "; full" in told
    assert not paths.record_request.exists()


def test_control_c_stops_the_recording(tmp_path: Path, paths: RunPaths, sidecar: Sidecar):
    command = start(paths, "--out", str(tmp_path / "rows"))
    wait_until_running(sidecar)

    command.send_signal(signal.SIGINT)

    told, _ = command.communicate(timeout=TIMEOUT_S)
    assert command.returncode == 0, told
    assert "; stopped on request" in told
    assert len(Recording(tmp_path / "rows")) == sidecar.live.progress.num_samples >= 3


def test_a_killed_command_leaves_a_recording_that_stop_ends(tmp_path: Path, paths: RunPaths, sidecar: Sidecar):
    command = start(paths, "--out", str(tmp_path / "rows"))
    wait_until_running(sidecar)
    command.kill()
    command.communicate()
    num_samples = sidecar.live.progress.num_samples

    stopped = start(paths, "--stop")

    told, _ = stopped.communicate(timeout=TIMEOUT_S)
    assert stopped.returncode == 0, told
    assert "; stopped on request" in told
    assert len(Recording(tmp_path / "rows")) > num_samples
    assert not paths.record_request.exists()


def test_what_cannot_be_recorded_is_one_line(tmp_path: Path, paths: RunPaths):
    refusing = launch(tmp_path / "refusing", "topk is 4")
    asked = start(paths, "--out", str(tmp_path / "rows"))
    deadline_s = time.monotonic() + TIMEOUT_S
    while not paths.record_request.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)

    second = start(paths, "--out", str(tmp_path / "other")).communicate(timeout=TIMEOUT_S)[0]
    refused = start(refusing, "--out", str(tmp_path / "rows")).communicate(timeout=TIMEOUT_S)[0]
    nothing = start(refusing, "--stop").communicate(timeout=TIMEOUT_S)[0]
    usage = start(paths).communicate(timeout=TIMEOUT_S)[0]

    asked.kill()
    asked.communicate()
    assert f"a recording into {tmp_path}/rows is under way; end it with `onlinespec record --stop`" in second
    assert "this server captures nothing: topk is 4" in refused
    assert "nothing is being recorded" in nothing
    assert "give --out DIR to begin, or --stop to end" in usage
