"""Replay rows by arm and order, over seeds: intervals, and the ratio to the recipe on the same streams."""

import statistics
from collections.abc import Sequence
from itertools import pairwise

import msgspec
from rich.table import Table

from onlinespec.bench.interval import Interval, mean_interval, ratio_interval
from onlinespec.bench.replay import RECOVERY_LEVELS, Recovery, ReplayRow

REFERENCE = "recipe"
OF_RECIPE = 0.9
"""share of the recipe's accept length at the end, on the shift domain and the same stream"""


class RecoveryLine(msgspec.Struct, frozen=True):
    """Recovery of the shift domain to one level, over seeds: a share of the oracle's accept length, or of the recipe's
    at the end.

    A seed that did not get there counts with all that came, so tokens, and a ratio below it, are then bounds.
    """

    level: float
    num_reached: int
    """seeds"""
    tokens: Interval
    requests: Interval
    tokens_over_recipe: Interval | None
    """paired by seed; None without a recipe, where this arm missed it in a seed, or where one had it at once"""
    is_at_most: bool
    """the recipe missed it in a seed: the true ratio is lower"""


class ReplayLine(msgspec.Struct, frozen=True):
    """One arm in one order. Accept lengths in tokens per verify step; see `replay.DomainResult` for the rest."""

    arm: str
    order: str
    num_seeds: int
    shift: str
    """the domain that came last, whose recovery is told"""
    recoveries: tuple[RecoveryLine, ...]
    """of the oracle"""
    to_recipe: RecoveryLine | None
    """of the recipe; None without one of each seed"""
    oracle: float
    """of the shift domain"""
    final: Interval
    """accept length on the shift domain at the end"""
    regret_area: Interval
    """over all domains"""
    forgotten: Interval
    """mean over the other domains"""
    num_swaps: int
    """over all seeds"""
    num_swaps_gained: int
    """after which the accept length on the domain then served was higher than before, on the held-out requests"""
    training_cpu_s: Interval


def shift_of(row: ReplayRow) -> str:
    """The domain that came into the stream last."""
    return list(dict.fromkeys(name for name, _, _ in row.begins))[-1]


def summarise_rows(rows: Sequence[ReplayRow]) -> list[ReplayLine]:
    """One line per order and arm, in order of first appearance."""
    keys = dict.fromkeys((row.order, row.arm) for row in rows)
    return [_line([row for row in rows if (row.order, row.arm) == key], rows) for key in keys]


def _line(own: Sequence[ReplayRow], rows: Sequence[ReplayRow]) -> ReplayLine:
    reference = {(row.order, row.seed): row for row in rows if row.arm == REFERENCE}
    shift = shift_of(own[0])
    ends = [row.domains[shift] for row in own]
    return ReplayLine(
        arm=own[0].arm,
        order=own[0].order,
        num_seeds=len(own),
        shift=shift,
        recoveries=tuple(_recovery(level, own, reference) for level in RECOVERY_LEVELS),
        to_recipe=_to_recipe(own, reference),
        oracle=ends[0].oracle,
        final=_mean([end.final for end in ends]),
        regret_area=_mean([sum(result.regret_area for result in row.domains.values()) for row in own]),
        forgotten=_mean(
            [statistics.fmean(result.forgotten for name, result in row.domains.items() if name != shift) for row in own]
        ),
        num_swaps=sum(row.num_swaps for row in own),
        num_swaps_gained=sum(num_gained(row) for row in own),
        training_cpu_s=_mean([row.training_cpu_s for row in own]),
    )


def num_gained(row: ReplayRow) -> int:
    """Swaps that raised the accept length on the domain of the request they came with."""
    count = 0
    for before, after in pairwise(row.looks):
        domain = next(name for name, begin, _ in reversed(row.begins) if begin < after.num_requests)
        count += after.accept_length[domain] > before.accept_length[domain]
    return count


def _mean(values: Sequence[float]) -> Interval:
    found = mean_interval(values)
    assert found is not None, "a line has a row"
    return found


def _recovery_of(row: ReplayRow, level: float) -> Recovery:
    return next(found for found in row.domains[shift_of(row)].recoveries if found.level == level)


def recovery_to(row: ReplayRow, accept_length: float) -> Recovery:
    """Of the shift domain, from its first request to the first draft with this accept length on it."""
    domain = shift_of(row)
    requests, tokens = next((requests, tokens) for name, requests, tokens in row.begins if name == domain)
    looks = (look for look in row.looks if look.accept_length[domain] >= accept_length)
    if (look := next(looks, None)) is None:
        return Recovery(OF_RECIPE, False, row.num_requests - requests, row.num_tokens - tokens)
    return Recovery(OF_RECIPE, True, max(0, look.num_requests - requests), max(0, look.num_tokens - tokens))


def _to_recipe(own: Sequence[ReplayRow], reference: dict[tuple[str, int], ReplayRow]) -> RecoveryLine | None:
    recipes = [reference[row.order, row.seed] for row in own if (row.order, row.seed) in reference]
    if len(recipes) < len(own):
        return None
    wanted = [OF_RECIPE * recipe.domains[shift_of(recipe)].final for recipe in recipes]
    mine = [recovery_to(row, length) for row, length in zip(own, wanted, strict=True)]
    theirs = [recovery_to(recipe, length) for recipe, length in zip(recipes, wanted, strict=True)]
    return _recovery_line(OF_RECIPE, mine, list(zip(mine, theirs, strict=True)))


def _recovery(level: float, own: Sequence[ReplayRow], reference: dict[tuple[str, int], ReplayRow]) -> RecoveryLine:
    found = [_recovery_of(row, level) for row in own]
    pairs = [
        (mine, _recovery_of(reference[row.order, row.seed], level))
        for row, mine in zip(own, found, strict=True)
        if (row.order, row.seed) in reference
    ]
    return _recovery_line(level, found, pairs)


def _recovery_line(level: float, found: Sequence[Recovery], pairs: Sequence[tuple[Recovery, Recovery]]) -> RecoveryLine:
    """pairs: this arm's and the recipe's, of the seeds that have both."""
    is_fit = all(mine.is_reached and mine.num_tokens and theirs.num_tokens for mine, theirs in pairs)
    ratio = ratio_interval([a.num_tokens for a, _ in pairs], [b.num_tokens for _, b in pairs]) if is_fit else None
    return RecoveryLine(
        level=level,
        num_reached=sum(one.is_reached for one in found),
        tokens=_mean([one.num_tokens for one in found]),
        requests=_mean([one.num_requests for one in found]),
        tokens_over_recipe=ratio,
        is_at_most=ratio is not None and not all(theirs.is_reached for _, theirs in pairs),
    )


def recovery_cells(line: RecoveryLine | None, num_seeds: int) -> tuple[str, str]:
    """Tokens, a lower bound where seeds missed it, and their ratio to the recipe's, an upper bound where it did."""
    if line is None:
        return "-", "-"
    missed = num_seeds - line.num_reached
    tokens = f"> {line.tokens.mean:.0f} ({missed} of {num_seeds} missed)" if missed else str(line.tokens)
    ratio = "-" if line.tokens_over_recipe is None else str(line.tokens_over_recipe)
    return tokens, f"at most {ratio}" if line.is_at_most else ratio


def table(lines: Sequence[ReplayLine]) -> Table:
    """A rich table, one row per line; recovery at the highest level, 90 % of the oracle."""
    result = Table(
        title="replay; t intervals of 95 % over seeds; regret: accept length short of the oracle's x 1000 tokens"
    )
    headings = ("order", "arm", "seeds", "tokens to 90 %", "over recipe", "final accept length")
    for heading in (
        *headings,
        f"tokens to {OF_RECIPE:.0%} of the recipe's",
        "over it",
        "regret",
        "forgotten",
        "swaps that gained",
    ):
        result.add_column(heading, justify="left" if heading in ("order", "arm") else "right")
    for line in lines:
        result.add_row(
            line.order,
            line.arm,
            str(line.num_seeds),
            *recovery_cells(line.recoveries[-1], line.num_seeds),
            f"{line.final} of {line.oracle:.3g}",
            *recovery_cells(line.to_recipe, line.num_seeds),
            str(line.regret_area),
            str(line.forgotten),
            f"{line.num_swaps_gained} of {line.num_swaps}",
        )
    return result
