"""The same traffic with a part of the loop taken out: the checks of the demo must then fail."""

import asyncio
import json
import time
from pathlib import Path

from onlinespec.bench.client import Sampling
from onlinespec.demo.result import build_result, checks
from onlinespec.demo.traffic import Phase, Traffic
from onlinespec.versions.journal import Journal, Judged, Promoted, RaceStarted
from onlinespec.world import WORLD
from onlinespec.world.corpus import FIRST_DOMAIN, SHIFT_DOMAIN
from tests.integration.servers import Server, sidecar

RANDOM_CANDIDATES = [str(Path(__file__).parent / "random_candidates.py")]


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


def test_with_the_trainer_disabled_nothing_is_learned_and_the_demos_checks_fail(served, on_first_version):
    num_events = len(Journal(served.paths).read())

    with sidecar(served, trainer={"enabled": False}):
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
    events, verdicts = [], []

    with sidecar(served, RANDOM_CANDIDATES, gate=cadence):
        for seed in range(4, 10):  # a sidecar that comes late to its requests finds them begun before its candidates
            play(served, num_tokens=3500, max_tokens=32, seed=seed)
            time.sleep(2)
            events = Journal(served.paths).read()[num_events:]
            verdicts = [event.verdict["decision"] for event in events if isinstance(event, Judged)]
            if len(verdicts) >= 3:
                break

    assert len(verdicts) >= 3
    assert set(verdicts) == {"drop"}
    assert not [event for event in events if isinstance(event, Promoted)]
