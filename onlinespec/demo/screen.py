"""What a person sees while the demo runs, and at its end."""

import time
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onlinespec.bench.summary import accept_length, conversations, summarise, table
from onlinespec.demo.result import Check, Result
from onlinespec.demo.traffic import Phase, Record

RECENT_REQUESTS = 16


class Screen:
    """The live table. `phases` are the ones that will be played, in order."""

    def __init__(self, phases: Sequence[Phase]):
        self._phases = phases
        self._started_s = time.monotonic()
        self.note = ""

    def draw(self, records: Sequence[Record], sidecar: dict) -> RenderableType:
        rows = Table(title="onlinespec demo", title_justify="left")
        for heading in ("phase", "answers", "tokens", "accept length now", "since its start", "tokens/s now"):
            rows.add_column(heading, justify="left" if heading == "phase" else "right")
        for phase in self._phases:
            answers = [record.answer for record in records if record.phase == phase.name]
            if not answers:
                rows.add_row(f"{phase.name} ({phase.domain})", "-", f"0/{phase.num_tokens}", "-", "-", "-")
                continue
            now, whole = summarise("", answers[-RECENT_REQUESTS:]), accept_length(list(conversations(answers).values()))
            rows.add_row(
                f"{phase.name} ({phase.domain})",
                str(len(answers)),
                f"{sum(answer.num_output_tokens for answer in answers)}/{phase.num_tokens}",
                f"{now.accept_length or 0:.2f}",
                f"{whole.mean if whole else 0:.2f}",
                f"{now.tokens_per_s or 0:.0f}",
            )
        return Group(rows, *(Text(line, style="dim") for line in self._lines(records, sidecar)), Text(self.note))

    def line(self, records: Sequence[Record], sidecar: dict) -> str:
        """One line of progress, for a log instead of a terminal."""
        now = summarise("", [record.answer for record in records[-RECENT_REQUESTS:]])
        return (
            f"{records[-1].phase}: {len(records)} answers, accept length {now.accept_length or 0:.2f} now,"
            f" {now.tokens_per_s or 0:.0f} tokens/s, draft version {sidecar.get('version', 1)},"
            f" trainer step {sidecar.get('trainer_step', 0)}, {self._left_s(records) / 60:.1f} min left"
        )

    def _lines(self, records: Sequence[Record], sidecar: dict) -> list[str]:
        race = sidecar.get("race")
        loss = sidecar.get("loss")
        lines = [
            f"trainer   step {sidecar.get('trainer_step', 0)}, loss {loss:.3f}"
            if loss
            else "trainer   waiting for samples",
            f"gate      {sidecar.get('promotions', 0)} promotions of {sidecar.get('candidates', 0)} candidates,"
            f" draft version {sidecar.get('version', 1)} in service",
        ]
        if race:
            lines.append(
                f"race      {race['requests']} held-out requests, mean gain {race['mean_gain']:+.2f},"
                f" e-value {race['e_value']:.3g} of {race['threshold']:.0f}"
            )
        if sidecar.get("last_verdict"):
            lines.append(f"verdict   {sidecar['last_verdict']}")
        lines.append(f"time left about {self._left_s(records) / 60:.1f} min")
        return lines

    def _left_s(self, records: Sequence[Record]) -> float:
        """From the mean speed so far; the phases end by tokens."""
        done = sum(record.answer.num_output_tokens for record in records)
        total = sum(phase.num_tokens for phase in self._phases)
        speed = max(done / max(time.monotonic() - self._started_s, 1e-9), 1.0)
        return max(0, total - done) / speed


def final(result: Result, found: Sequence[Check]) -> RenderableType:
    """The summary table and the checks."""
    swaps = (
        f"{result.promotions} promotions, {result.rollbacks} by rollback and its undoing; verdicts: "
        + ", ".join(f"{count} {decision}" for decision, count in result.verdicts.items())
        + f"; {result.holdout_frac:.0%} of conversations never train,"
        + f" a candidate every {result.candidate_steps} trainer steps"
    )
    gaps = (
        f"longest gap between tokens: {_ms(result.longest_gap_at_swap_s)} within 0.25 s of a swap,"
        f" {_ms(result.longest_gap_elsewhere_s)} elsewhere"
    )
    rest = (
        f"{result.num_failed} failed requests, {result.dropped_rows} rows dropped,"
        f" {result.repeats_frac:.1%} of answers left out as repeats,"
        f" {result.seconds / 60:.1f} min with the server ready"
    )
    lines = [
        Text(("ok    " if check.is_met else "FAIL  ") + check.text, style="green" if check.is_met else "red")
        for check in found
    ]
    return Group(table(result.fifths, "accept length by phase"), Text(swaps), Text(gaps), Text(rest), *lines)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.0f} ms"
