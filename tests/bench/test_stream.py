"""Arms, and results that grow row by row."""

import json
from pathlib import Path

import msgspec
import pytest

from onlinespec.bench.arms import ARMS, LIVE_ARMS, REPLAY_ARMS, parse_arm
from onlinespec.bench.stream_results import Results
from onlinespec.errors import BenchError
from onlinespec.resolve import load_config


class Row(msgspec.Struct):
    arm: str
    seed: int
    value: float


def test_every_arm_of_a_list_exists_and_its_settings_are_ones_the_config_knows():
    for name in {*REPLAY_ARMS, *LIVE_ARMS}:
        load_config([], ARMS[name].overrides)


def test_an_arm_may_carry_settings_of_its_own_and_keeps_them_in_its_name():
    arm = parse_arm("onlinespec trainer.loss=reverse_kl gate.min_requests=4")

    assert arm.name == "onlinespec trainer.loss=reverse_kl gate.min_requests=4"
    assert (arm.gate, arm.overrides) == ("race", ("trainer.loss=reverse_kl", "gate.min_requests=4"))


def test_settings_of_an_arm_come_after_those_it_has_anyway():
    config = load_config([], parse_arm("recipe trainer.unroll_steps=3").overrides)

    assert (config.trainer.unroll_steps, config.trainer.optimizer) == (3, "adamw")


@pytest.mark.parametrize(
    ("text", "told"),
    [("frosen", "'frosen': no such arm; wanted one of none, frozen"), ("frozen trainer.seed=1", "trains nothing")],
)
def test_an_arm_that_cannot_be_is_refused_by_name(text: str, told: str):
    with pytest.raises(BenchError, match=told):
        parse_arm(text)


def test_rows_are_on_disk_as_soon_as_they_are_put_and_are_found_again(tmp_path: Path):
    path = tmp_path / "r.json"
    Results(path, "a bench", {"tokens": 5}).put(Row("x", 1, 2.5), arm="x", seed=1)

    again = Results(path, "a bench", {"tokens": 5})

    found = again.find(arm="x", seed=1)
    assert found is not None
    assert (found["value"], again.find(arm="x", seed=2)) == (2.5, None)
    assert {"commit", "time"} <= found.keys()
    assert "command" in json.loads(path.read_text())["provenance"]


def test_a_row_takes_the_place_of_the_one_with_its_key(tmp_path: Path):
    results = Results(tmp_path / "r.json", "a bench", {})
    for value in (1.0, 2.0):
        results.put(Row("x", 1, value), arm="x", seed=1)
    results.put(Row("x", 2, 3.0), arm="x", seed=2)

    assert [row["value"] for row in results.rows] == [2.0, 3.0]


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("a bench", {"tokens": 6}, "was made with tokens 5, wanted 6; give another --out"),
        ("another", {"tokens": 5}, "holds 'a bench', wanted 'another'"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_left_alone(tmp_path: Path, kind: str, settings: dict, told: str):
    path = tmp_path / "r.json"
    Results(path, "a bench", {"tokens": 5}).put(Row("x", 1, 2.5), arm="x", seed=1)
    before = path.read_bytes()

    with pytest.raises(BenchError, match=told):
        Results(path, kind, settings)

    assert path.read_bytes() == before


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "r.json"
    path.write_text("{")

    with pytest.raises(BenchError, match=r"r\.json: no result of a bench"):
        Results(path, "a bench", {})
