"""The power curve of bench_gate.py: what gain is promoted within how many requests."""

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLORS = {"betting": "tab:blue", "bernstein": "tab:orange"}
DIFFERENCES = "40 steps apart"


def plot(report, path):
    figure, (shares, medians) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    for test, color in COLORS.items():
        rows = [row for row in report["power"] if (row["test"], row["differences"]) == (test, DIFFERENCES)]
        first = [row for row in rows if row["candidate"] == 1]
        gains = [row["gain"] for row in first]
        for within, style in (("100", ":"), ("300", "--"), ("1000", "-")):
            label = f"{test}, within {within}"
            shares.plot(gains, [row["within"][within] for row in first], style, color=color, label=label)
        for number, style in ((1, "-"), (20, "--"), (200, ":")):
            held = [row for row in rows if row["candidate"] == number and row["median_requests"]]
            label = f"{test}, candidate {number}"
            medians.plot(
                [row["gain"] for row in held], [row["median_requests"] for row in held], style, color=color, label=label
            )
    shares.set_ylabel("share promoted (first candidate, open-ended)")
    medians.set_ylabel("median held-out requests to promote")
    medians.set_yscale("log")
    for axes in (shares, medians):
        axes.set_xscale("log")
        axes.set_xticks(gains, [f"{gain:g}" for gain in gains], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel("true gain, tokens of accept length")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    spread = report["pools"][DIFFERENCES]["sd"]
    config = report["config"]
    figure.suptitle(
        f"Promotion gate: real differences of drafts {DIFFERENCES} (sd {spread:.2f}), min_gain "
        f"{config['min_gain_tokens']:g}, alpha {config['alpha']:g}",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)
