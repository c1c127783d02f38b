"""Bad candidates offered to a real server under load, each refused by the stage it should be; a good one is promoted.

The whole battery, with candidates that were trained wrongly, is benchmarks/bench_battery.py.
"""

import itertools
import json
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.header import WEIGHTS_FILE, canonical_names
from onlinespec.offers import offer, waiting
from onlinespec.resolve import load_config
from onlinespec.trainer.step import Trainer
from onlinespec.versions.journal import AnyEvent, Journal, Judged, Promoted, Published, RaceStarted
from onlinespec.world import WORLD
from tests.integration.servers import Server, send, sidecar, world_prompts

UNSOUND = ("NaN", "truncated", "wrong digest", "embed_tokens", "extra layers")
WORSE = ("zeros", "random")
MAX_ROUNDS = 60
SHORT_RACES = {"holdout_frac": 0.9, "futility_requests": 12, "max_requests": 80, "min_span_s": 2.0}
SHORT_TRIALS = {"block_steps": 8, "min_pairs": 4, "harm_tolerance_tokens": 0.3, "max_step_cost_ratio": 1.5}


@pytest.fixture
def candidates(served, learned, on_first_version, tmp_path: Path) -> Path:
    """A folder for each. The good one went on from the learned draft, against an untrained one in service."""
    config, untrained = read_draft(served.paths.version(1))
    _, weights = read_draft(served.paths.version(2))
    trainer = Trainer(load_config([served.paths.resolved_config]).trainer, config, weights, read_embedding(WORLD))
    for start in range(0, 12, 4):
        assert trainer.step(learned[start : start + 4]).is_applied
    write_draft(tmp_path / "good", config, trainer.weights())
    generator = torch.Generator().manual_seed(7)
    noise = {n: torch.randn(t.shape, generator=generator) * t.shape[-1] ** -0.5 for n, t in untrained.items()}
    write_draft(tmp_path / "random", config, noise)
    write_draft(tmp_path / "zeros", config, {name: torch.zeros_like(t) for name, t in untrained.items()})
    write_draft(tmp_path / "NaN", config, weights | {"norm.weight": torch.full_like(weights["norm.weight"], torch.nan)})
    for name in ("truncated", "wrong digest", "embed_tokens"):
        write_draft(tmp_path / name, config, noise | {"norm.weight": torch.full_like(noise["norm.weight"], len(name))})
    file = tmp_path / "truncated" / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-1000])
    table = torch.zeros(config.vocab_size, config.hidden_size)
    save_file(noise | {"model.embed_tokens.weight": table}, tmp_path / "embed_tokens" / WEIGHTS_FILE)
    deeper = replace(config, num_layers=2)
    more = {name: torch.zeros(shape) for name, shape in canonical_names(deeper).items() if name not in weights}
    write_draft(tmp_path / "extra layers", deeper, weights | more)
    return tmp_path


def target_checksum(served: Server) -> str:
    """SGLang's own, over every tensor of the target."""
    body = json.dumps({"action": "checksum", "selector": "target"}).encode()
    request = urllib.request.Request(f"{served.base_url}/weights_checker", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["per_engine_checksum"]


def greedy(served: Server) -> list[str]:
    return [answer.text for answer in send(served, world_prompts(6, seed=77), concurrency=1, max_tokens=32)]


def under_load(served: Server, num_events: int) -> Iterator[tuple[AnyEvent, ...]]:
    """What the journal gained, after each round of fresh requests."""
    for seed in itertools.count(900):
        send(served, world_prompts(8, seed=seed, domains=("code",)), max_tokens=40)
        yield Journal(served.paths).read()[num_events:]


def test_no_bad_candidate_is_promoted_a_good_one_is_and_the_target_stays_what_it_was(served, candidates):
    before = target_checksum(served), greedy(served)
    num_events = len(Journal(served.paths).read())
    for name in (*UNSOUND, *WORSE, "good"):
        offer(served.paths.root, candidates / name, "0" * 64 if name == "wrong digest" else "")

    with sidecar(
        served, ["-m", "onlinespec.sidecar"], trainer={"enabled": False}, gate=SHORT_RACES, canary=SHORT_TRIALS
    ):
        for events in itertools.islice(under_load(served, num_events), MAX_ROUNDS):
            if any(isinstance(event, Promoted) for event in events):
                break

    judged = {event.source: event.verdict for event in events if isinstance(event, Judged)}
    raced = [event.source for event in events if isinstance(event, RaceStarted)]
    assert {name for name, verdict in judged.items() if verdict.get("stage") == "sound"} == set(UNSOUND)
    assert all(judged[name]["reason"].startswith("not sound: ") for name in UNSOUND)
    assert raced == [*WORSE, "good"]
    assert {judged[name]["decision"] for name in WORSE} == {"drop"}
    (published,) = (event for event in events if isinstance(event, Published))
    (promoted,) = (event for event in events if isinstance(event, Promoted))
    assert (promoted.version, promoted.by) == (published.version, "gate")
    assert waiting(served.paths) == []
    assert (target_checksum(served), greedy(served)) == before
