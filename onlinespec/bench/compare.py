"""`onlinespec bench compare`: two results of `bench accept` on the same conversations, paired."""

import math
from collections.abc import Mapping
from pathlib import Path

import msgspec
from rich.table import Table

from onlinespec.bench.estimate import Estimate, mean_ratio, ratio_difference
from onlinespec.bench.result import Cell, Sample, read_result
from onlinespec.bench.summary import Counts, conversations
from onlinespec.errors import BenchError

OF_THE_SERVER = ("base_url", "model")
"""settings in which two compared results may differ"""


class Difference(msgspec.Struct, frozen=True):
    """One cell of b against the same of a; None where there was nothing to measure.

    Requests are paired by conversation and turn, intervals are between conversations.
    """

    cell: str
    num_pairs: int
    num_unpaired: int
    """requests that succeeded in one of the two only, or were not asked there yet"""
    accept_length_a: float | None
    accept_length_b: float | None
    accept_length: Estimate | None
    """of b less that of a, both token-weighted over the pairs"""
    speed: Estimate | None
    """geometric mean of b's tokens/s of a request over a's"""
    same_text_frac: float | None
    """share of pairs whose answers are the same text: 1 is wanted of greedy answers of one target"""


class Comparison(msgspec.Struct, frozen=True):
    a: str
    b: str
    differences: list[Difference]


def compare(path_a: Path, path_b: Path) -> Comparison:
    """Raises: BenchError naming every setting in which the two differ, the server's address and model left out."""
    a, b = read_result(path_a), read_result(path_b)
    others = a.settings.differences(b.settings, but=OF_THE_SERVER)
    if others:
        raise BenchError(
            f"{path_a} and {path_b} were not asked the same: {'; '.join(others)}; measure both with one command"
        )
    cells = zip(a.cells, b.cells, strict=True)
    return Comparison(str(path_a), str(path_b), [_difference(*pair) for pair in cells])


def _difference(a: Cell, b: Cell) -> Difference:
    good_a, good_b = _by_place(a), _by_place(b)
    places = sorted(good_a.keys() & good_b.keys())
    counts_a = conversations(good_a[place].answer() for place in places)
    counts_b = conversations(good_b[place].answer() for place in places)
    lengths = _parts(counts_a), _parts(counts_b)
    same = [good_a[place].text_digest == good_b[place].text_digest for place in places]
    return Difference(
        cell=a.name,
        num_pairs=len(places),
        num_unpaired=len(good_a.keys() ^ good_b.keys()),
        accept_length_a=_of(*lengths[0]),
        accept_length_b=_of(*lengths[1]),
        accept_length=ratio_difference(*lengths[0], *lengths[1]),
        speed=_speed([(good_a[place], good_b[place]) for place in places]),
        same_text_frac=sum(same) / len(same) if same else None,
    )


def _by_place(cell: Cell) -> dict[tuple[int, int], Sample]:
    return {(sample.number, sample.turn): sample for sample in cell.samples if not sample.error}


def _parts(counts: Mapping[int, Counts]) -> tuple[list[float], list[float]]:
    """Emitted tokens and verify steps of each conversation, in order of their numbers."""
    ordered = [counts[number] for number in sorted(counts)]
    steps = [float(of_one.num_verify_steps) for of_one in ordered]
    return [of_one.num_verify_steps + of_one.num_correct_drafts for of_one in ordered], steps


def _of(emitted: list[float], steps: list[float]) -> float | None:
    return sum(emitted) / sum(steps) if sum(steps) else None


def _speed(pairs: list[tuple[Sample, Sample]]) -> Estimate | None:
    """A conversation's logarithm is the mean over its turns."""
    logs: dict[int, list[float]] = {}
    for a, b in pairs:
        if a.num_output_tokens and b.num_output_tokens:
            speed_a, speed_b = a.num_output_tokens / a.done_s, b.num_output_tokens / b.done_s
            logs.setdefault(a.number, []).append(math.log(speed_b / speed_a))
    return mean_ratio([sum(values) / len(values) for values in logs.values()])


def to_json(found: Comparison) -> str:
    return msgspec.json.format(msgspec.json.encode(found)).decode()


def compare_table(found: Comparison) -> Table:
    """A rich table, one row per cell."""
    shown = Table(title=f"{found.b} against {found.a}, 95 % between conversations")
    for heading in ("", "pairs", "unpaired", "accept length", "difference", "tokens/s, ratio", "same text"):
        shown.add_column(heading, justify="left" if not heading else "right")
    for row in found.differences:
        lengths = (row.accept_length_a, row.accept_length_b)
        shown.add_row(
            row.cell,
            str(row.num_pairs),
            str(row.num_unpaired),
            " -> ".join("-" if length is None else f"{length:.2f}" for length in lengths),
            _estimate(row.accept_length, "+.3f"),
            _estimate(row.speed, ".3f"),
            "-" if row.same_text_frac is None else f"{row.same_text_frac:.1%}",
        )
    return shown


def _estimate(found: Estimate | None, spec: str) -> str:
    if found is None:
        return "-"
    if found.low is None or found.high is None:
        return format(found.value, spec)
    return f"{found.value:{spec}} ({found.low:{spec}} to {found.high:{spec}})"
