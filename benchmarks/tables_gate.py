"""Sections of RESULTS.md on the gate: each from the JSON of one script, as `bench_table` asks for them."""

from collections.abc import Iterable
from typing import Any

from bench_parts import DASH, made_by, markdown

from onlinespec.config import GuardConfig

Content = dict[str, Any]
TESTS = ("betting", "bernstein")
GAINS = (0.05, 0.1, 0.2, 0.5)


def share(row: Content, key: str) -> str:
    """A share with its Wilson interval."""
    low, high = row["interval"]
    return f"{row[key]:.4f} ({low:.4f} to {high:.4f})"


def gate(content: Content) -> str:
    """False promotions of the worse of the two pools, lives of candidates, requests to promote a better one, slices."""
    parts = [made_by(content), _pools(content), _false_promotions(content), _lives(content), _power(content)]
    parts.append(_slices(content))
    equal = "; ".join(f"{row['test']} {row['equal']} of {row['races']}" for row in content["replayed"])
    return "\n\n".join([*parts, f"Races of the sidecar's own class that ended as the arrays did: {equal}."])


def _pools(content: Content) -> str:
    said = (
        f"{name}: {pool['requests']} requests, mean {pool['mean']:.3f}, sd {pool['sd']:.3f}"
        for name, pool in content["pools"].items()
    )
    return f"Pools: {'; '.join(said)}."


def _false_promotions(content: Content) -> str:
    found = content["false_promotions"]
    rows = []
    for null in dict.fromkeys(row["null"] for row in found):
        of_null = [row for row in found if row["null"] == null]
        worst = [max(_of(of_null, test=test), key=lambda row: float(row["found"])) for test in TESTS]
        promised = f"{worst[0]['promised']:g}" if worst[0]["is_promised"] else "nothing"
        rows.append((null, promised, *(share(row, "found") for row in worst)))
    return markdown((f"null, {found[0]['races']:,} races", "promised", *TESTS), rows)


def _lives(content: Content) -> str:
    found = {row["test"]: row for row in content["lives"]}
    one = found[TESTS[0]]
    row = (
        f"{one['lives']:,} lives of {one['candidates']} null candidates, {one['minutes_apart']:g} minutes apart",
        f"{one['promised_per_life']:.2f} (levels spent: {one['levels_spent_per_life']:.2f})",
        *(share(found[test], "found_per_life") for test in TESTS),
    )
    return markdown(("false promotions per life", "promised", *TESTS), [row])


def _power(content: Content) -> str:
    """Both pools in a cell: median requests where a race may go on, and the share promoted within all rules."""
    rows = []
    for gain in GAINS:
        of_gain = _of(content["power"], gain=gain)
        for number in dict.fromkeys(row["candidate"] for row in of_gain):
            line = _of(of_gain, candidate=number)
            cells = [
                " / ".join(spelt.format(row[key]) for row in _of(line, test=test))
                for test in TESTS
                for key, spelt in (("median_requests", "{:.0f}"), ("promoted_with_rules", "{:.2f}"))
            ]
            rows.append((f"{gain:g}", f"{number} ({line[0]['alpha']:.4f})", *cells))
    pools = " / ".join(content["pools"])
    headings = [word for test in TESTS for word in (f"{test}: median requests, {pools}", "promoted within the rules")]
    return markdown(("true gain", "candidate (level)", *headings), rows)


def _slices(content: Content) -> str:
    found = content["slices"]
    rows = []
    for betting in _of(found, test=TESTS[0]):
        place = {key: betting[key] for key in ("share", "gain_of_slice", "gain_of_others")}
        (other,) = _of(found, test=TESTS[1], **place)
        requests = [betting[f"median_requests_to_{end}"] for end in ("promote", "refuse")]
        rows.append(
            (
                f"{betting['share']:g}, {betting['gain_of_slice']:+g}, {betting['gain_of_others']:+g}",
                "nothing" if betting["promised"] is None else f"{betting['promised']:g}",
                share(betting, "promoted"),
                share(other, "promoted"),
                ", ".join(DASH if value is None else f"{value:.0f}" for value in requests),
            )
        )
    headings = (
        *("slice's share, its gain, gain elsewhere", "promised", f"promoted, {TESTS[0]}", f"promoted, {TESTS[1]}"),
        f"median requests, {TESTS[0]}: promoted, refused",
    )
    return f"Slices, {found[0]['races']} races a line:\n\n{markdown(headings, rows)}"


def guard(content: Content) -> str:
    rows = content["rows"]
    default = GuardConfig().false_alarm_requests
    damaged = [
        (row["question"], f"{row['median_requests']:.0f} ({row['max_requests']:.0f})")
        for row in rows
        if row.get("false_alarm_requests") == default and "median_requests" in row
    ]
    lost = [
        (
            f"{row['question']}: {row['loss_tokens']:g} tokens lost, sd {row['sd']:g}",
            f"{row['median_requests']:.0f} ({row['max_requests']:.0f})",
        )
        for row in rows
        if row["question"].startswith("delay")
    ]
    health = "; ".join(
        f"{row['question']}, sd {row['sd']:g}: {row['alarms']} of {row['requests']:,} requests"
        for row in rows
        if row["question"].startswith("health")
    )
    edge = "; ".join(
        f"{row['share']:.2%} where at most {row['bound']:.0%}" for row in _of(rows, question="edge of harm")
    )
    (turns,) = _of(rows, question="traffic turns")
    canary = [
        (
            f"{row['effect']:+g}, x{row['cost']:g}, {row['running']} running",
            ", ".join(f"{end} {number}" for end, number in row["outcomes"].items()),
            f"{row['median_pairs']:.0f}",
        )
        for row in _of(rows, question="canary")
    ]
    return "\n\n".join(
        (
            made_by(content),
            markdown(("the guard", "requests to the alarm: median (most)"), [*damaged, *lost]),
            f"Alarms in health: {health}. Lives at the edge of harm that alarmed: {edge}. Runs of {turns['runs']} that"
            f" alarmed where traffic turned hard for both: quality {turns['quality']}, integrity {turns['clean']}.",
            markdown(("the canary: effect in tokens, step cost", "outcomes", "median pairs of blocks"), canary),
        )
    )


def battery(content: Content) -> str:
    rows = [(row["candidate"], row["stage"], row["reason"].removeprefix("not sound: ")) for row in content["rows"]]
    said = (
        f"{content['requests']} requests, {content['failed_requests']} failed; bad candidates promoted:"
        f" {', '.join(content['bad_promoted']) or 'none'}; undecided: {', '.join(content['undecided']) or 'none'}."
    )
    return f"{made_by(content)}\n\n{said}\n\n{markdown(('candidate', 'ended by', 'reason'), rows)}"


def _of(rows: Iterable[Content], **wanted: object) -> list[Content]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
