"""Sections of RESULTS.md on training: each from the JSON of one script, as `bench_table` asks for them."""

import statistics
from collections.abc import Sequence
from typing import Any

from bench_parts import DASH, made_by, markdown, spread

from onlinespec.config import DriftConfig

Content = dict[str, Any]


def learning(content: Content) -> str:
    """A column per arm; an arm that has not run on a seed beside the others is compared on those it has."""
    by_arm = {line["arm"]: line for line in content["summary"]}
    lines = (
        ("accept length at the end of code", "start_final", 2),
        ("answer tokens to 90 % of the recipe's last accept length, code", "start_to_recipe", 0),
        ("over the recipe's", "start_to_recipe_over_recipe", 2),
        ("to 90 % of the better arm's last, code", "start_to_best", 0),
        ("accept length at the end of support", "shift_final", 2),
        ("answer tokens to 90 % of the recipe's last accept length, support", "shift_to_recipe", 0),
        ("over the recipe's", "shift_to_recipe_over_recipe", 2),
        ("to 90 % of the better arm's last, support", "shift_to_best", 0),
        ("code after support, over code before it", "return", 2),
        ("CPU seconds of training, both phases", "training_cpu_s", 0),
    )
    rows = [(said, *(spread(line.get(key), digits) for line in by_arm.values())) for said, key, digits in lines]
    seeds = {arm: sum(row["arm"] == arm for row in content["rows"]) for arm in by_arm}
    steps = {
        arm: statistics.mean(row["optimizer_steps"] for row in content["rows"] if row["arm"] == arm) for arm in by_arm
    }
    rows.append(("optimizer steps, mean", *(f"{steps[arm]:.0f}" for arm in by_arm)))
    return f"{made_by(content)}\n\n" + markdown(("", *(f"{arm} ({seeds[arm]} seeds)" for arm in by_arm)), rows)


def bfloat16(content: Content) -> str:
    """The last look of each phase, by seed."""
    rows = [
        (
            row["arm"],
            str(row["seed"]),
            *(f"{curve[-1][1]:.2f}" for curve in row["curves"]),
            f"{row['training_cpu_s']:.0f}",
        )
        for row in content["rows"]
    ]
    return f"{made_by(content)}\n\n" + markdown(("arm", "seed", "code", "support", "CPU s"), rows)


def trainer_step(content: Content) -> str:
    rows = [
        (
            f"{row['shape']}, {row['traffic']}",
            row["system"],
            f"{row['answer_tokens_per_cpu_s']:.1f}",
            spread(row["speed_ratio"], 2),
            f"{row['peak_mib']:.0f}",
            f"{row['peak_ratio']:.2f}",
        )
        for row in content["rows"]
    ]
    agreed = "; ".join(
        f"{shape}: loss {at['loss']:.0e}, gradients {at['gradient']:.0e}"
        for shape, at in content["relative_differences"].items()
    )
    headings = (
        "shape, traffic",
        "system",
        "answer tokens per CPU s",
        "speed over plain, median (least to most)",
        "peak MiB",
        "peak over plain",
    )
    return f"{made_by(content)}\n\nRelative differences on one batch: {agreed}.\n\n{markdown(headings, rows)}"


def kv_modes(content: Content) -> str:
    """Means over seeds, and each seed's last quarter against free's."""
    free = {(row["start"], row["seed"]): row for row in content["rows"] if row["mode"] == "free"}

    def over_free(start: str, mode: str) -> str:
        gains = [
            row["accept_length_last_quarter"] - free[start, row["seed"]]["accept_length_last_quarter"]
            for row in content["rows"]
            if (row["start"], row["mode"]) == (start, mode) and (start, row["seed"]) in free
        ]
        return DASH if mode == "free" else ", ".join(f"{gain:+.2f}" for gain in gains)

    rows = [
        (
            line["start"],
            line["mode"],
            spread(line["accept_length_right_after_a_swap"], 2),
            spread(line["accept_length_10s_after_a_swap"], 2),
            spread(line["accept_length_last_quarter"], 2),
            over_free(line["start"], line["mode"]),
            spread(line["live_minus_shadow"], 3),
            f"{line['training_cpu_s'][0]:.0f}",
        )
        for line in content["summary"]
    ]
    headings = (
        *("start", "mode", "right after a swap", "later", "last quarter of the stream", "its gain over free by seed"),
        *("live minus shadow", "training CPU s"),
    )
    return f"{made_by(content)}\n\n" + markdown(headings, rows)


def loss_change(content: Content) -> str:
    lines = {(line["to"], line["how"]): line for line in content["summary"]}
    before = content["summary"][0]["before"][0]
    rows = [
        (
            to,
            *(
                f"{lines[to, how][key][0]:.2f}" if (to, how) in lines else DASH
                for how in ("ramp", "at once")
                for key in ("lowest", "end")
            ),
        )
        for to in dict.fromkeys(to for to, _ in lines)
    ]
    headings = ("then", "lowest, ramped", "end, ramped", "lowest, at once", "end, at once")
    return f"{made_by(content)}\n\nBefore the change {before:.2f}.\n\n{markdown(headings, rows)}"


def drift(content: Content) -> str:
    """The default's line of each spread, then what is told as what."""
    single = [row for row in content["rows"] if row["question"] == "one test" and _is_default(row)]
    told = [row for row in content["rows"] if row["question"] != "one test"]
    rows = [
        (
            f"{row['spread']:g}",
            f"{row['alarmed_share']:.1%}",
            f"{row['steps_to_0.5'][0]:.0f}",
            f"{row['steps_to_0.6'][0]:.0f}",
            f"{row['missed_to_0.6']:.1%}",
        )
        for row in single
    ]
    alarms = [
        (row["question"], f"{row['spread']:g}", *(f"{row[kind]:.0%}" for kind in _KINDS))
        for row in sorted(told, key=lambda row: [other["question"] for other in told].index(row["question"]))
    ]
    first = markdown(
        ("spread", "alarmed in 20,000 steady steps", "median steps to see 0.5", "to see 0.6", "0.6 missed"), rows
    )
    second = markdown(("four clusters, three positions", "spread", *(f"told as {kind}" for kind in _KINDS)), alarms)
    return f"{made_by(content)}\n\n{first}\n\n{second}"


_KINDS: Sequence[str] = ("traffic", "draft", "new_traffic", "mix")


def _is_default(row: Content) -> bool:
    default = DriftConfig()
    return (row["slack_frac"], row["threshold"]) == (default.slack_frac, default.threshold)
