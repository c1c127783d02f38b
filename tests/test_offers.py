"""Candidates from outside: how they wait, what is refused before a race, and that a sound one races like any other."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from onlinespec import offers
from onlinespec.cli import app
from onlinespec.config import CanaryConfig, Config, GateConfig
from onlinespec.draft.checkpoint import write_draft
from onlinespec.draft.header import digest
from onlinespec.errors import CheckpointError
from onlinespec.history import history_lines
from onlinespec.launch import Launch
from onlinespec.paths import RunPaths
from onlinespec.promote import Promoter
from onlinespec.versions.journal import Journal, Judged, Paused, Promoted, RaceStarted, Resumed, RolledBack
from onlinespec.versions.state import state_of
from onlinespec.wire.messages import GetHello, Hello
from onlinespec.wire.sockets import ControlClient
from tests.draft.tiny import build_draft, write_target
from tests.fake_server import PROVENANCE, TARGET, FakeServer, lay_out

WITHOUT_CANARY = Config(canary=CanaryConfig(enabled=False))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return lay_out(tmp_path / "run")


@pytest.fixture
def promoter(paths: RunPaths, tmp_path: Path) -> Promoter:
    """Version 3 is in service."""
    return build_promoter(paths, tmp_path, WITHOUT_CANARY)


def build_promoter(paths: RunPaths, tmp_path: Path, config: Config) -> Promoter:
    FakeServer(paths, 3)
    target = write_target(tmp_path / "target")
    launch = Launch(str(target), "d", 1, TARGET, "127.0.0.1", 1, 3, 128, os.getpid())
    control = ControlClient(paths.control_endpoint)
    hello = control.request(GetHello())
    assert isinstance(hello, Hello)
    return Promoter(paths, config, launch, control, hello, torch.zeros(29, 16), lambda _: False)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a draft's directory; `changes` are of its config."""

    def write(name: str = "theirs", seed: int = 9, **changes) -> Path:
        draft = build_draft(seed, **changes)
        write_draft(tmp_path / name, draft.config, draft.weights())
        return tmp_path / name

    return write


def judged(paths: RunPaths) -> list[Judged]:
    return [event for event in Journal(paths).read() if isinstance(event, Judged)]


def num_races(paths: RunPaths) -> int:
    return sum(isinstance(event, RaceStarted) for event in Journal(paths).read())


def test_an_offer_waits_as_a_copy_with_its_digest_and_a_second_one_changes_nothing(paths, write):
    path = write()

    first = offers.offer(paths.root, path)
    again = offers.offer(paths.root, path)
    second = offers.offer(paths.root, write("other", seed=10))

    found = offers.waiting(paths)
    assert [(offer.name, offer.digest) for offer in found] == [
        ("theirs", digest(path)),
        ("other", digest(path.parent / "other")),
    ]
    assert (found[0].folder / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert first.startswith("theirs waits for the gate behind 0 others")
    assert again == f"a draft with digest {digest(path)[:12]} is waiting already; nothing was changed"
    assert second.startswith("other waits for the gate behind 1 others")
    assert {path.name[0] for path in paths.offers.iterdir()}.isdisjoint(".")


def test_the_command_offers_a_draft_under_the_digest_it_is_told(paths, write):
    words = ["offer", str(write()), "--digest", "A" * 64, "--run-dir", str(paths.root)]

    done = CliRunner().invoke(app, words)

    assert (done.exit_code, done.stdout.count("\n")) == (0, 1)
    assert [offer.digest for offer in offers.waiting(paths)] == ["a" * 64]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_an_offer_without_both_files_is_an_error_and_nothing_waits(paths, write, file):
    path = write()
    (path / file).unlink()

    with pytest.raises(CheckpointError, match=f"{file}: no such file"):
        offers.offer(paths.root, path)

    assert offers.waiting(paths) == []


def test_a_sound_offer_races_and_is_promoted_under_its_name_and_the_trainer_goes_on_from_it(paths, promoter, write):
    offers.offer(paths.root, write())

    promoter.take_offer()
    assert promoter.race is not None
    promoter._conclude(msgspec.structs.replace(promoter.race.withdraw("better", now_s=2.0), decision="promote"))

    events = Journal(paths).read()
    (verdict,) = judged(paths)
    started = [event for event in events if isinstance(event, RaceStarted)][-1]
    assert (verdict.source, started.source) == ("theirs", "theirs")
    assert isinstance(events[-1], Promoted)
    assert promoter.service.version == 4
    assert promoter.has_moved
    assert promoter.service._store.manifest(4).provenance.source == "theirs"
    assert any("candidate" in line and "(theirs)" in line for line in history_lines(paths.root))


def test_offers_are_taken_one_at_a_time_oldest_first_and_only_when_nothing_is_judged(paths, promoter, write):
    for name, seed in (("first", 9), ("second", 10)):
        offers.offer(paths.root, write(name, seed))

    promoter.take_offer()
    promoter.take_offer()

    assert num_races(paths) == 2 + 1  # two of the run directory's past
    assert [offer.name for offer in offers.waiting(paths)] == ["second"]


def test_an_offer_waits_while_the_gate_is_paused_or_over_budget(paths, tmp_path, write):
    offers.offer(paths.root, write())
    Journal(paths).append(Paused(time_s=2.0))
    promoter = build_promoter(paths, tmp_path, replace_gate(max_candidates_per_hour=1))

    promoter.take_offer()
    Journal(paths).append(RaceStarted(time_s=time.time(), candidate_digest="x", alpha=0.01))
    Journal(paths).append(Resumed(time_s=3.0))
    promoter.take_offer()

    assert len(offers.waiting(paths)) == 1
    assert not promoter.is_busy


def replace_gate(**changes) -> Config:
    return Config(gate=GateConfig(**changes))


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def smuggle(path: Path) -> None:
    save_file(build_draft(9).weights() | {"model.embed_tokens.weight": torch.zeros(29, 16)}, path / "model.safetensors")


def spoil(path: Path) -> None:
    weights = build_draft(9).weights()
    weights["norm.weight"][3] = float("nan")
    write_draft(path, build_draft().config, weights)


def remap(path: Path) -> None:
    """A map that the served draft, of the whole vocabulary, has not."""
    save_file(build_draft(9).weights() | {"d2t": torch.arange(29).flip(0)}, path / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "damage", "said"),
    [
        ({}, truncate, r"truncated: found \d+ bytes"),
        ({}, smuggle, "holds model.embed_tokens.weight, which is the target's own table"),
        ({}, spoil, "norm.weight holds 1 values that are not finite"),
        ({}, remap, "d2t maps to other ids, which SGLang would follow"),
        ({"num_layers": 2}, None, "num_layers is 2, the draft in service has 1; train it in that shape"),
        ({"draft_vocab_size": 20}, None, "draft_vocab_size is 20, the draft in service has 29"),
        (
            {"aux_layers": (2, 4, 5)},
            None,
            r"aux_layers \(inputs captured\) is \[3, 5, 6\], the draft in service has \[2, 4, 5\]",
        ),
    ],
)
def test_an_offer_that_is_not_sound_gets_no_race_and_leaves_the_folder(paths, promoter, write, changes, damage, said):
    path = write(**changes)
    if damage is not None:
        damage(path)
    offers.offer(paths.root, path)

    promoter.take_offer()

    (verdict,) = judged(paths)
    assert verdict.source == "theirs"
    assert (verdict.verdict["decision"], verdict.verdict["stage"]) == ("drop", "sound")
    assert verdict.verdict["reason"].startswith("not sound: ")
    assert re.search(said, verdict.verdict["reason"])
    assert num_races(paths) == 2
    assert state_of(Journal(paths).read()).num_candidates == 2
    assert offers.waiting(paths) == []
    assert not promoter.is_busy


def test_an_offer_of_other_bytes_than_its_digest_is_refused_by_both(paths, promoter, write):
    offers.offer(paths.root, write(), "F" * 64)

    promoter.take_offer()

    (verdict,) = judged(paths)
    assert f"has digest {digest(write())[:12]}, wanted ffffffffffff; it was damaged" in verdict.verdict["reason"]


def test_the_same_captured_layers_spelt_as_ids_are_no_difference(paths, promoter, write):
    offers.offer(paths.root, write(aux_layers=(1, 3, 4)))

    promoter.take_offer()

    assert promoter.race is not None


def test_offered_weights_in_service_or_rolled_back_are_refused_and_said_so(paths, promoter, write):
    barred = digest(write())
    Journal(paths).append(
        RolledBack(time_s=3.0, from_version=9, to_version=3, by="operator", barred_digest=barred),
    )
    offers.offer(paths.root, write("theirs"))
    offers.offer(paths.root, paths.version(3))

    promoter.take_offer()
    promoter.take_offer()

    first, second = (event.verdict["reason"] for event in judged(paths))
    assert "were rolled back" in first
    assert second == "these weights are in service already"
    assert num_races(paths) == 2


def test_a_diverged_trainers_weights_are_refused_by_name_and_the_next_ones_race(paths, promoter, capsys):
    diverged = build_draft(9).weights()
    diverged["lm_head.weight"][0, 0] = float("inf")

    promoter.freeze(diverged, PROVENANCE)
    assert not promoter.is_busy
    promoter.freeze(build_draft(9).weights(), PROVENANCE)

    (verdict,) = judged(paths)
    assert verdict.verdict["reason"] == "not sound: lm_head.weight has values that are not finite"
    assert verdict.source == ""
    assert promoter.race is not None
    assert num_races(paths) == 2 + 1
    assert "lm_head.weight has values that are not finite" in capsys.readouterr().out
    assert "lm_head.weight" in str(promoter.status()["last_refusal"])


@pytest.mark.parametrize("name", ["norm.weight", "embed_tokens.weight"])
def test_weights_of_other_names_than_those_in_service_are_refused(paths, promoter, name):
    weights = build_draft(9).weights()
    if weights.pop(name, None) is None:
        weights[name] = torch.zeros(2)

    promoter.freeze(weights, PROVENANCE)

    (verdict,) = judged(paths)
    assert verdict.verdict["reason"].startswith("not sound: it ")
    assert name in verdict.verdict["reason"]
