"""The same traffic with a part of the loop taken out: the checks of the demo must then fail."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from onlinespec.bench.client import Sampling
from onlinespec.demo.result import build_result, checks
from onlinespec.demo.traffic import Phase, Traffic
from onlinespec.operate import roll_back
from onlinespec.resolve import dump_config, load_config
from onlinespec.versions.journal import Journal, Judged, Promoted, RaceStarted
from onlinespec.versions.state import state_of
from onlinespec.world import WORLD
from onlinespec.world.corpus import FIRST_DOMAIN, SHIFT_DOMAIN
from tests.integration.servers import REPOSITORY, Server

RANDOM_CANDIDATES = Path(__file__).parent / "random_candidates.py"


@contextlib.contextmanager
def sidecar(served: Server, command: list[str], **changes) -> Iterator[None]:
    """Run a sidecar on the shared server with some sections of its config replaced."""
    config = load_config([served.paths.resolved_config])
    sections = {name: msgspec.structs.replace(getattr(config, name), **fields) for name, fields in changes.items()}
    served.paths.resolved_config.write_text(dump_config(msgspec.structs.replace(config, **sections)))
    served.paths.trainer_state.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, *command, str(served.paths.root)], env=environment)
    try:
        yield
        assert process.poll() is None, "the sidecar ended early"
    finally:
        process.terminate()
        process.wait(30)
        served.paths.resolved_config.write_text(dump_config(config))


def play(served: Server, num_tokens: int, max_tokens: int, seed: int):
    """seed: another for each test, since the server has the prompts of one cached, whose rows a new sidecar lacks."""
    phases = [Phase(FIRST_DOMAIN, FIRST_DOMAIN, num_tokens), Phase(SHIFT_DOMAIN, SHIFT_DOMAIN, num_tokens)]
    traffic = Traffic(served.base_url, str(WORLD), Sampling(max_tokens=max_tokens), seed)

    async def run() -> None:
        async def ignore(_record) -> None: ...

        for phase in phases:
            await traffic.play(phase, ignore)

    asyncio.run(run())
    return phases, traffic.records


@pytest.fixture
def on_first_version(served, capture, learned):
    """The untrained draft in service. `capture` ends first: two receivers would share the samples between them."""
    capture.close()
    if state_of(Journal(served.paths).read()).incumbent != 1:
        roll_back(served.paths.root, to=1)


def test_with_the_trainer_disabled_nothing_is_learned_and_the_demos_checks_fail(served, on_first_version):
    num_events = len(Journal(served.paths).read())

    with sidecar(served, ["-m", "onlinespec.sidecar"], trainer={"enabled": False}):
        phases, records = play(served, num_tokens=2500, max_tokens=64, seed=3)
        time.sleep(3)
        status = json.loads(served.paths.sidecar_status.read_bytes())

    events = Journal(served.paths).read()[num_events:]
    result = build_result(phases, records, events, dropped_rows=0, seconds=1, holdout_frac=0.5, candidate_steps=1)
    failed = {check.text.split(":")[0] for check in checks(result) if not check.is_met}
    assert status["training_samples"] > 20
    assert status["trainer_step"] == 0
    assert not [event for event in events if isinstance(event, RaceStarted | Promoted)]
    assert {"learned the first domain", "learned the new domain", "0 promoted swaps, wanted 3"} <= failed
    assert result.num_failed == 0


def test_candidates_of_random_weights_are_judged_and_never_promoted(served, on_first_version):
    num_events = len(Journal(served.paths).read())
    cadence = {"candidate_steps": 2, "futility_requests": 12, "holdout_frac": 0.6}

    with sidecar(served, [str(RANDOM_CANDIDATES)], gate=cadence):
        play(served, num_tokens=3500, max_tokens=32, seed=4)
        time.sleep(2)

    events = Journal(served.paths).read()[num_events:]
    verdicts = [event.verdict["decision"] for event in events if isinstance(event, Judged)]
    assert len(verdicts) >= 3
    assert set(verdicts) == {"drop"}
    assert not [event for event in events if isinstance(event, Promoted)]
