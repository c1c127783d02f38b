"""The command line itself: what prints, and what is wrong usage."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from onlinespec.cli import app
from onlinespec.config import Config
from onlinespec.resolve import dump_config

RUNNER = CliRunner()


@pytest.mark.parametrize("words", [["config"], ["config", "show"]])
def test_config_prints_every_resolved_value(words: list[str]):
    done = RUNNER.invoke(app, words)

    assert (done.exit_code, done.stdout) == (0, dump_config(Config()))


def test_config_explain_prints_one_field(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("trainer:\n  seed: 7\n")

    done = RUNNER.invoke(app, ["config", "explain", "trainer.seed", "--config", str(tmp_path / "a.yaml")])

    assert done.exit_code == 0
    assert done.stdout.startswith("trainer.seed = 7\n")
    assert f"{tmp_path}/a.yaml:2" in done.stdout


def test_options_before_explain_are_wrong_usage_and_not_ignored():
    done = RUNNER.invoke(app, ["config", "--set", "trainer.seed=1", "explain"])

    assert done.exit_code == 2
    assert "behind `explain`" in done.output
