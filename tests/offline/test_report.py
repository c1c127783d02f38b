"""Figures arrive where --report-to sends them, and a missing package is one clear sentence."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from onlinespec.errors import TrainError
from onlinespec.offline.report import build_reporter
from tests.offline.small import build_plan, run
from tests.offline.test_train import losses, report


def test_tensorboard_reads_every_loss_and_accept_length(tmp_path: Path):
    plan = replace(build_plan(tmp_path), report_to="tensorboard")

    run(plan)

    events = EventAccumulator(str(plan.out / "tensorboard"))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    assert written == [(line["step"], pytest.approx(line["loss"])) for line in losses(plan.out)]
    evaluations = report(plan.out)["evaluation"]["accept_lengths"]
    found = [(event.step, event.value) for event in events.Scalars("accept_length")]
    assert found == [(entry["step"], pytest.approx(entry["accept_length"])) for entry in evaluations]


class StubWandb(ModuleType):
    """Stands in for the wandb package, which is too large to install for a test: records the calls."""

    def __init__(self):
        super().__init__("wandb")
        self.calls: list[tuple] = []

    def init(self, **settings):
        self.calls.append(("init", settings))
        return self

    def log(self, values, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


def test_wandb_gets_the_settings_then_the_figures_then_the_end(tmp_path: Path, monkeypatch):
    stub = StubWandb()
    monkeypatch.setitem(sys.modules, "wandb", stub)
    plan = replace(build_plan(tmp_path), report_to="wandb")

    run(plan)

    assert stub.calls[0][1]["config"]["trainer.seed"] == "3"
    assert stub.calls[0][1]["dir"] == str(plan.out)
    logged = [call[2]["loss"] for call in stub.calls if call[0] == "log" and "loss" in call[2]]
    assert logged == [line["loss"] for line in losses(plan.out)]
    assert stub.calls[-1] == ("finish",)


@pytest.mark.parametrize(("target", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch, target, module: str
):
    monkeypatch.setitem(sys.modules, module, None)

    with pytest.raises(TrainError, match=rf"--report-to {target}: .*; pip install {target}"):
        build_reporter(target, tmp_path, {})


def test_none_imports_nothing_and_writes_nothing(tmp_path: Path, monkeypatch):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)

    reporter = build_reporter("none", tmp_path, {})
    reporter.scalars(1, {"loss": 1.0})
    reporter.close()

    assert list(tmp_path.iterdir()) == []
