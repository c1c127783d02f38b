"""The product as a user runs it: serve with its own sidecar, killed, rolled back, stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onlinespec.draft.config import read_target
from onlinespec.draft.header import check_draft
from onlinespec.gate.holdout import is_holdout
from onlinespec.record.reader import Recording
from onlinespec.resolve import load_config
from onlinespec.serve import plan
from onlinespec.versions.journal import CanaryEnded, Journal, Promoted, RolledBack
from onlinespec.wire.messages import GetStatus, Status
from onlinespec.world import WORLD
from tests.integration.servers import DEMO_CONFIG, Load, Server, free_port, sidecar_status, start_ours, wait_for


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    root = tmp_path_factory.mktemp("product")
    sets = ["trainer.checkpoint_s=2"]
    server = start_ours(root, free_port(), sets=sets)
    yield server
    server.stop(signal.SIGKILL)


def sidecar_pids(server: Server) -> list[int]:
    wanted = ["-m", "onlinespec.sidecar", str(server.paths.root)]
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            words = Path(f"/proc/{entry}/cmdline").read_text().split("\0")
        except OSError:
            continue
        if words[1:4] == wanted:
            found.append(int(entry))
    return found


def command(*words: str, timeout: float = 60) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", "onlinespec.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout)


def test_a_draft_learns_and_is_promoted_and_kill_nine_in_a_trial_costs_no_request(product):
    def served() -> Status:
        return product.control.request(GetStatus())

    def promoted() -> list[Promoted]:
        return [event for event in Journal(product.paths).read() if isinstance(event, Promoted)]

    with Load(product) as load:
        wait_for(lambda: served().switchback, "a trial")
        wait_for(lambda: product.paths.trainer_state.exists(), "a checkpoint of the trainer")
        num_steps, incumbent = sidecar_status(product)["trainer_step"], served().version
        is_tried = served().switchback > incumbent
        (pid,) = sidecar_pids(product)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: sidecar_pids(product) not in ([], [pid]), "a new sidecar")
        wait_for(lambda: not served().switchback, "the end of the trial")
        left = served().version
        wait_for(lambda: sidecar_status(product).get("resumes", 0) >= 1, "the sidecar to resume")
        wait_for(lambda: sidecar_status(product)["trainer_step"] > num_steps, "training to go on")
        wait_for(promoted, "a promotion")
        num_before = len(load.answers)
        wait_for(lambda: len(load.answers) >= num_before + 12, "answers with the new draft")

    passed = [e.version for e in Journal(product.paths).read() if isinstance(e, CanaryEnded) and e.decision == "pass"]
    learned = load.answers[-8:]
    assert is_tried
    assert left == incumbent
    assert "again in 1 s" in product.log_text()
    assert promoted()[0].version in passed
    assert sum(a.num_correct_drafts for a in learned) > sum(a.num_correct_drafts for a in load.answers[:8])
    assert served().fuse == "closed"


def test_rollback_works_with_the_sidecar_dead_and_bars_what_it_left(product):
    version = product.control.request(GetStatus()).version
    (pid,) = sidecar_pids(product)
    os.kill(pid, signal.SIGSTOP)

    done = command("rollback", "--run-dir", str(product.paths.root))

    os.kill(pid, signal.SIGCONT)
    assert done.returncode == 0, done.stderr
    assert product.control.request(GetStatus()).version < version
    event = [e for e in Journal(product.paths).read() if isinstance(e, RolledBack)][-1]
    assert event.from_version == version
    assert event.barred_digest


def test_status_and_history_tell_what_happened(product):
    told = command("status", "--run-dir", str(product.paths.root))
    history = command("history", "--run-dir", str(product.paths.root))

    assert told.returncode == history.returncode == 0
    assert "capture   on, fuse closed" in told.stdout
    assert "by the gate" in history.stdout
    assert "rolled back" in history.stdout


def test_record_keeps_training_rows_on_disk_and_train_learns_from_them_without_the_server(product, tmp_path):
    words = ["record", "--run-dir", str(product.paths.root)]
    idle = command(*words, "--stop")

    with Load(product):
        done = command(*words, "--out", str(tmp_path / "rows"), "--max-gb", "0.002", timeout=240)
    again = command(*words, "--stop")

    recording = Recording(tmp_path / "rows")
    samples = list(recording)
    frac = load_config([product.paths.resolved_config]).gate.holdout_frac
    size = sum(path.stat().st_size for path in (tmp_path / "rows").iterdir())
    assert done.returncode == 0, done.stderr
    assert "full" in done.stderr
    assert "nothing is being recorded" in idle.stderr
    assert again.returncode == 1
    assert 1_000_000 < size <= 2_000_000
    assert sidecar_status(product)["recording"]["state"] == "full"
    assert samples
    assert not any(is_holdout(sample.group, frac) for sample in samples)
    assert recording.manifest.facts.aux_layers == (2, 4, 5)
    assert not product.paths.record_request.exists()
    where = ["--recording", str(tmp_path / "rows"), "--target", str(WORLD), "--out", str(tmp_path / "out")]
    trained = command("train", *where, "--draft", "init", "--epochs", "2", timeout=240)
    assert trained.returncode == 0, trained.stderr
    check_draft(tmp_path / "out" / "draft", read_target(WORLD))


def test_bench_accept_reads_the_servers_counters_and_writes_json(product, tmp_path):
    out = tmp_path / "bench.json"

    done = command("bench", "accept", "--base-url", product.base_url, "--requests", "8", "--json", str(out))

    assert done.returncode == 0, done.stderr
    (cell,) = json.loads(out.read_text())["cells"]
    rows = cell["rows"]
    assert [row["name"] for row in rows][-1] == "all"
    assert rows[-1]["num_requests"] == 8
    assert rows[-1]["num_failed"] == 0
    assert rows[-1]["accept_length"] >= 1.0


def test_sigint_stops_both_processes_cleanly_and_the_next_start_serves_the_last_draft_in_service(product):
    pids = sidecar_pids(product)
    version = product.control.request(GetStatus()).version

    returncode = product.stop(signal.SIGINT)

    assert returncode == 0
    assert pids
    assert sidecar_pids(product) == []
    assert "Traceback" not in product.log_text().split("onlinespec: ready")[1]
    again = plan(str(WORLD), "init", product.paths.root, load_config([DEMO_CONFIG]), ["--port", str(free_port())])
    assert again.launch.version == version
    assert "resuming draft version" in again.notices[0]
