"""What the trainer process does with a request, on a stand-in server."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from onlinespec.draft.sample import Sample
from onlinespec.launch import Launch, write_launch
from onlinespec.paths import RunPaths
from onlinespec.resolve import dump_config, load_config
from onlinespec.sidecar import Sidecar
from onlinespec.versions.journal import Journal, RolledBack
from tests.draft.tiny import write_target
from tests.fake_server import TARGET, FakeServer, lay_out
from tests.offline.small import build_samples

HEADER = [28, 27]
SMALL = ("gate.holdout_frac=0.000001", "buffer.recent_samples=6", "buffer.reservoir_samples=8", "pace.duty_frac=1.0")


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = lay_out(tmp_path / "run")
    target = write_target(tmp_path / "target")
    write_launch(paths, Launch(str(target), "d", 1, TARGET, "127.0.0.1", 1, 3, 128, os.getpid()))
    paths.resolved_config.write_text(dump_config(load_config([], SMALL)))
    return paths


@pytest.fixture
def server(paths: RunPaths) -> FakeServer:
    return FakeServer(paths, 3)


@pytest.fixture
def start(paths: RunPaths, server: FakeServer) -> Iterator[Callable[[], Sidecar]]:
    """Starts another sidecar on the server."""
    with contextlib.ExitStack() as stack:

        def start() -> Sidecar:
            sidecar = Sidecar(paths.root)
            stack.callback(sidecar._intake.close)
            sidecar._generation_prompt = HEADER
            return sidecar

        yield start


def turn(number: int, words: tuple[int, ...] = (1, 2)) -> Sample:
    """A first turn that says these words."""
    sample = build_samples(number + 1)[number]
    prompt = [*words, *HEADER]
    tokens_T = sample.tokens_T.clone()
    tokens_T[: sample.num_prompt_tokens] = torch.tensor([*prompt, *[3] * 9])[: sample.num_prompt_tokens]
    return replace(sample, tokens_T=tokens_T)


def judged(sidecar: Sidecar, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool, bool]]:
    """(request, is a judge, its answer has trained) of each that the gate is shown."""
    told = []

    def observe(sample: Sample, cluster: int | None, is_judge: bool) -> None:
        told.append((sample.request, is_judge, sidecar._sides.was_trained_on(sample.answer_key)))

    monkeypatch.setattr(sidecar.promoter, "observe", observe)
    return told


def test_a_new_conversation_judges_before_it_trains_and_its_repeat_only_trains(start, monkeypatch):
    sidecar = start()
    told = judged(sidecar, monkeypatch)

    for number in (0, 1):
        sidecar._file(turn(number))

    assert told == [(0, True, False), (1, False, False)]
    assert sidecar.counters["training_samples"] == 2
    assert sidecar.counters["judging_samples"] == 1


def test_what_has_trained_is_known_after_a_restart_on_another_version(paths, server, start, monkeypatch):
    sidecar = start()
    sidecar._file(turn(0))
    sidecar._save()
    Journal(paths).append(RolledBack(time_s=9.0, from_version=3, to_version=2, by="operator", barred_digest=None))
    server.version = 2

    again = start()
    told = judged(again, monkeypatch)
    again._file(turn(1))
    again._file(turn(2, words=(4, 5)))

    assert again.counters["resumes"] == 0
    assert [is_judge for _, is_judge, _ in told] == [False, True]


@pytest.mark.parametrize(("took_s", "apart_s"), [(0.1, 30.0), (5.0, 100.0)])
def test_checkpoints_that_take_long_are_made_seldom(start, monkeypatch, took_s: float, apart_s: float):
    sidecar, now_s = start(), [7.0]
    clock = SimpleNamespace(monotonic=lambda: now_s[0], time=time.time)
    monkeypatch.setattr("onlinespec.sidecar.time", clock)
    monkeypatch.setattr("onlinespec.sidecar.sync_path", lambda path: now_s.append(now_s.pop() + took_s))

    sidecar._save()

    assert sidecar._save_every_s == pytest.approx(apart_s)


@pytest.mark.parametrize(
    ("gain", "is_cut_short", "num_requests", "num_refused"),
    [(0.0, False, 20, 1), (0.3, False, 20, 1), (0.0, True, 20, 1), (0.3, True, 20, 0), (0.0, False, 2, 0)],
)
def test_a_race_that_made_room_is_a_refusal_only_where_it_showed_no_gain(
    start, gain: float, is_cut_short: bool, num_requests: int, num_refused: int
):
    sidecar = start()
    verdict = SimpleNamespace(decision="drop", num_requests=num_requests, mean_gain_tokens=gain)
    sidecar._control = SimpleNamespace(acknowledged=lambda _: None)
    sidecar.promoter.last_verdict = verdict
    sidecar.promoter.cut_short = verdict if is_cut_short else None

    sidecar._steer()
    sidecar._steer()

    assert sidecar._pace.saved() == {"num_refused": num_refused}
