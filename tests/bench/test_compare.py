"""Two results side by side: paired by conversation and turn, refused where they were not asked the same."""

import json
import math
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from onlinespec.bench.compare import compare
from onlinespec.bench.result import Cell, Result, Sample, Settings, Suite, write_result
from onlinespec.cli import app
from onlinespec.errors import BenchError

SETTINGS = Settings(
    base_url="http://a",
    model="m",
    suites=[Suite("demo", 4, "d" * 64)],
    concurrencies=[4],
    temperatures=[0.0],
    max_tokens=64,
    seed=1,
    is_streamed=True,
    num_warmup=0,
    is_flushed=False,
)


def sample(number: int, steps: int, correct: int, done_s: float, **other) -> Sample:
    counted = {"num_verify_steps": steps, "num_correct_drafts": correct, "num_output_tokens": 20}
    return Sample(number=number, turn=0, domain="chat", sent_s=0.0, done_s=done_s, **counted | other)


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, samples: list[Sample], **changes) -> Path:
        settings = msgspec.structs.replace(SETTINGS, **changes)
        cell = Cell("demo", 4, 0.0, samples=samples, is_complete=True)
        path = tmp_path / name
        write_result(path, Result(settings, [], [cell]))
        return path

    return write_file


FIRST = [sample(0, 10, 5, 1.0), sample(1, 20, 10, 2.0), sample(2, 5, 1, 1.0)]
BETTER = [sample(2, 4, 2, 0.5), sample(0, 8, 8, 0.5), sample(1, 15, 15, 1.0)]


def test_b_is_compared_with_a_conversation_by_conversation_whatever_their_order(write):
    (found,) = compare(write("a.json", FIRST), write("b.json", BETTER, base_url="http://b", model="n")).differences

    before, after = 1 + 16 / 35, 1 + 25 / 27
    assert (found.num_pairs, found.num_unpaired) == (3, 0)
    assert (found.accept_length_a, found.accept_length_b) == pytest.approx((before, after))
    assert found.accept_length.value == pytest.approx(after - before)
    assert found.accept_length.low < found.accept_length.value < found.accept_length.high
    assert (found.speed.value, found.speed.low, found.speed.high) == pytest.approx((2, 2, 2))


def test_what_failed_in_one_of_them_is_left_out_of_both_and_counted(write):
    broken = [BETTER[0], BETTER[1], sample(1, 0, 0, 9.0, error="gone")]

    (found,) = compare(write("a.json", FIRST), write("b.json", broken)).differences

    assert (found.num_pairs, found.num_unpaired) == (2, 1)
    assert found.accept_length_a == pytest.approx(1 + 6 / 15)


def test_the_turns_of_a_conversation_are_one_unit(write):
    turns = FIRST[:2]
    second = [msgspec.structs.replace(turn, done_s=turn.done_s / 4) for turn in turns]
    folded = [msgspec.structs.replace(turn, number=0, turn=place) for place, turn in enumerate(turns)]
    folded_second = [msgspec.structs.replace(turn, number=0, turn=place) for place, turn in enumerate(second)]

    (apart,) = compare(write("a.json", turns), write("b.json", second)).differences
    (together,) = compare(write("c.json", folded), write("d.json", folded_second)).differences

    assert apart.speed.value == pytest.approx(together.speed.value) == pytest.approx(4)
    assert apart.speed.low is not None
    assert together.speed.low is None, "one conversation says nothing of how they vary"
    assert together.num_pairs == 2


def test_without_counters_speeds_are_compared_still(write):
    plain = [msgspec.structs.replace(one, num_verify_steps=0, num_correct_drafts=0) for one in FIRST]

    (found,) = compare(write("a.json", plain), write("b.json", BETTER)).differences

    assert (found.accept_length_a, found.accept_length) == (None, None)
    assert math.log2(found.speed.value) == pytest.approx(1)


def test_the_share_of_equal_answers_is_told(write):
    digests = [msgspec.structs.replace(one, text_digest="aa") for one in FIRST]
    others = [digests[0], digests[1], msgspec.structs.replace(digests[2], text_digest="bb")]

    (found,) = compare(write("a.json", digests), write("b.json", others)).differences

    assert found.same_text_frac == pytest.approx(2 / 3)


def test_files_that_were_not_asked_the_same_are_refused_with_every_difference(write):
    other = write("b.json", BETTER, max_tokens=32, suites=[Suite("demo", 4, "e" * 64)])

    with pytest.raises(BenchError) as caught:
        compare(write("a.json", FIRST), other)

    told = str(caught.value)
    assert "max_tokens 64 against 32" in told
    assert "suites [demo of dddddddddddd] against [demo of eeeeeeeeeeee]" in told
    assert "seed" not in told


def test_a_file_that_is_missing_or_of_another_kind_is_refused_by_name(write, tmp_path: Path):
    odd = tmp_path / "odd.json"
    odd.write_text('{"kind": "bench stream"}')

    with pytest.raises(BenchError, match=r"odd\.json: .*wanted a file that `onlinespec bench accept --json` wrote"):
        compare(write("a.json", FIRST), odd)
    with pytest.raises(BenchError, match=r"absent\.json: no such file"):
        compare(write("a.json", FIRST), tmp_path / "absent.json")


def test_the_command_shows_a_table_or_json(write):
    words = ["bench", "compare", str(write("a.json", FIRST)), str(write("b.json", BETTER))]

    shown, told = (CliRunner().invoke(app, [*words, *more], env={"COLUMNS": "200"}) for more in ([], ["--json"]))

    assert "1.46 -> 1.93" in shown.output
    assert json.loads(told.stdout)["differences"][0]["num_pairs"] == 3
