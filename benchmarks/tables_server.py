"""Sections of RESULTS.md on the running server: each from the JSON of one script, as `bench_table` asks for them."""

from typing import Any

from bench_parts import DASH, made_by, markdown

Content = dict[str, Any]


def demo(content: Content) -> str:
    rows = [
        (
            fifth["name"],
            f"{fifth['accept_length']:.2f} ({fifth['accept_length_low']:.2f} to {fifth['accept_length_high']:.2f})",
            f"{fifth['tokens_per_s']:.0f}",
            f"{fifth['num_requests'] - fifth['num_failed']} of {fifth['num_requests']}",
        )
        for fifth in content["fifths"]
    ]
    verdicts = ", ".join(f"{number} {word}" for word, number in content["verdicts"].items())
    near_ms, elsewhere_ms = (1000 * content[f"longest_gap_{where}_s"] for where in ("at_swap", "elsewhere"))
    said = (
        f"Promoted {content['promotions']}, rolled back {content['rollbacks']}; verdicts: {verdicts}; failed requests"
        f" {content['num_failed']}, rows dropped {content['dropped_rows']}, answers left out as repeats"
        f" {content['repeats_frac']:.1%}; longest gap between tokens {near_ms:.0f} ms near a swap,"
        f" {elsewhere_ms:.0f} ms elsewhere; {content['seconds'] / 60:.1f} minutes with the server ready."
    )
    table = markdown(("part of a phase", "accept length (95 %)", "tokens/s, 4 users", "answers"), rows)
    return f"{made_by(content)}\n\n{table}\n\n{said}"


def fidelity(content: Content) -> str:
    rows = [
        (
            line["fidelity"].replace("_", " "),
            "its own" if line["is_kv_own"] else "others' too",
            str(line["requests"]),
            f"{line['share']:.1%}",
            f"{line['verify_steps']:,}",
            f"{line['equal']}",
            f"{line['live']:.3f}",
            f"{line['shadow']:.3f}",
            f"{line['live_minus_shadow']:+.3f} ({line['standard_deviation']:.3f})",
        )
        for line in content["summary"]
    ]
    parts = content["parts"]
    said = "; ".join(f"{part['samples']} samples under {part['versions']} versions" for part in parts)
    headings = (
        *("rows", "draft KV in the cache", "requests", "share", "verify steps", "equal as integers", "live", "shadow"),
        "live minus shadow (sd)",
    )
    return f"{' '.join(made_by(part) for part in parts)}\n\n{said}.\n\n{markdown(headings, rows)}"


def swap(content: Content) -> str:
    """Gaps in decode steps of that load."""
    rows = []
    for row in content["rows"]:
        places = [row[place]["decode_steps"] for place in ("at", "away")]
        copied = row.get("duration_ms")
        rows.append(
            (
                f"{row['what']}, {row['windows_met']} times",
                str(row["streams"]),
                f"{row['step_ms']:.1f} ms",
                *(f"{at['median']:.2f}, {at['99 %']:.2f}, {at['longest']:.2f}" for at in places),
                f"{row['share_of_places_with_as_long_a_mean_of_longest_gaps']:.3f}",
                f"{copied['median']:.1f} ms, {copied['longest']:.1f} ms" if copied else DASH,
            )
        )
    headings = (
        *("what", "streams", "step", "at it: median, 99 %, longest", "away: median, 99 %, longest", "as long"),
        "the copy: median, longest",
    )
    return f"{made_by(content['rows'][0])}\n\n{markdown(headings, rows)}"
