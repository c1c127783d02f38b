"""The file that `bench accept` writes: settings, where it came from, and every request as it was measured.

No text of a prompt or an answer is in it, only digests. It is written whole and renamed, so that what is there can be
read after any end, and a benchmark that is asked for again with the same file and settings goes on with it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from onlinespec.bench.client import Answer, Prompt
from onlinespec.bench.provenance import Provenance
from onlinespec.bench.summary import Summary, summarise
from onlinespec.errors import BenchError

_DIGITS = 5
"""of a second: chunks come at most every few hundred microseconds"""


class Sample(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request. sent_s: since its cell began, pauses between sessions left out; the other times since it was sent.

    number, turn: of its conversation in the suite. text_digest: the first 16 hex digits of the answer's SHA-256.
    """

    number: int
    turn: int
    domain: str
    sent_s: float
    done_s: float
    chunk_s: list[float] = []
    chunk_tokens: list[int] = []
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_verify_steps: int = 0
    num_correct_drafts: int = 0
    histogram: list[int] = []
    has_counters: bool = False
    finish_reason: str = ""
    text_digest: str = ""
    error: str = ""

    @classmethod
    def of(cls, answer: Answer, began_s: float) -> "Sample":
        """began_s: on the answer's clock, when the cell's was 0."""
        return cls(
            number=answer.prompt.number,
            turn=answer.prompt.turn,
            domain=answer.domain,
            sent_s=round(answer.sent_s - began_s, _DIGITS),
            done_s=round(answer.done_s - answer.sent_s, _DIGITS),
            chunk_s=[round(chunk_s - answer.sent_s, _DIGITS) for chunk_s in answer.chunk_s],
            text_digest=hashlib.sha256(answer.text.encode()).hexdigest()[:16],
            **{name: getattr(answer, name) for name in _SAME},
        )

    def answer(self) -> Answer:
        """As it was, without its texts, on the cell's clock."""
        return Answer(
            Prompt(self.domain, (), number=self.number, turn=self.turn),
            self.sent_s,
            chunk_s=[self.sent_s + chunk_s for chunk_s in self.chunk_s],
            done_s=self.sent_s + self.done_s,
            **{name: getattr(self, name) for name in _SAME},
        )


_SAME = tuple(
    name
    for name in Sample.__struct_fields__
    if name not in ("number", "turn", "domain", "sent_s", "done_s", "chunk_s", "text_digest")
)


class Suite(msgspec.Struct, frozen=True):
    """A suite as it was asked. digest: SHA-256 over its conversations in order."""

    source: str
    num_prompts: int
    digest: str

    @classmethod
    def of(cls, source: str, prompts: Sequence[Prompt]) -> "Suite":
        told = msgspec.json.encode([(prompt.domain, prompt.messages, prompt.follow_ups) for prompt in prompts])
        return cls(source, len(prompts), hashlib.sha256(told).hexdigest())


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of which server. Two files can be compared where all but the server are the same."""

    base_url: str
    model: str
    suites: list[Suite]
    concurrencies: list[int]
    temperatures: list[float]
    max_tokens: int
    seed: int
    is_streamed: bool
    num_warmup: int
    """requests before each cell that are not counted"""
    is_flushed: bool
    """whether the server's prefix cache was emptied before each cell"""

    def differences(self, other: "Settings", but: Sequence[str] = ()) -> list[str]:
        """One clause for each setting that is another in `other`."""
        found = []
        for name in self.__struct_fields__:
            ours, theirs = getattr(self, name), getattr(other, name)
            if name not in but and ours != theirs:
                found.append(f"{name} {_told(ours)} against {_told(theirs)}")
        return found


class Cell(msgspec.Struct):
    """Figures of one suite at one concurrency and temperature. rows: one per domain, and the total."""

    suite: str
    concurrency: int
    temperature: float
    rows: list[Summary] = []
    samples: list[Sample] = []
    is_complete: bool = False

    @property
    def name(self) -> str:
        return f"{self.suite}, {self.concurrency} users, temperature {self.temperature:g}"

    def summarise(self) -> None:
        self.rows = summaries_of([sample.answer() for sample in self.samples])


class Result(msgspec.Struct):
    """The whole file. sessions: one for each time it was worked on."""

    settings: Settings
    sessions: list[Provenance]
    cells: list[Cell]
    kind: Literal["bench accept"] = "bench accept"


def summaries_of(answers: Sequence[Answer]) -> list[Summary]:
    """One row per domain, in order of first appearance, and the total."""
    domains = list(dict.fromkeys(answer.domain for answer in answers))
    rows = [summarise(domain, [a for a in answers if a.domain == domain]) for domain in domains]
    return [*rows, summarise("all", answers)] if len(rows) != 1 else rows


def write_result(path: Path, result: Result) -> None:
    """Replace the file, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(msgspec.json.encode(result) + b"\n")
    temporary.rename(path)


def read_result(path: Path) -> Result:
    """Raises: BenchError where it is missing or was not written by `bench accept`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Result)
    except FileNotFoundError as error:
        raise BenchError(f"{path}: no such file; give one that `onlinespec bench accept --json` wrote") from error
    except msgspec.MsgspecError as error:
        raise BenchError(f"{path}: {error}; wanted a file that `onlinespec bench accept --json` wrote") from error


def begin(path: Path | None, settings: Settings) -> Result:
    """What the file holds already, or an empty grid. Raises: BenchError where its settings are others, each named."""
    if path is not None and path.exists():
        found = read_result(path)
        differences = settings.differences(found.settings)
        if differences:
            raise BenchError(
                f"{path}: was begun with other settings: {'; '.join(differences)} there; ask for the same to go on"
                " with it, or give another --json"
            )
        return found
    grid = [
        Cell(suite.source, concurrency, temperature)
        for suite in settings.suites
        for concurrency in settings.concurrencies
        for temperature in settings.temperatures
    ]
    return Result(settings, [], grid)


def _told(value: object) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_told, value)) + "]"
    return f"{value.source} of {value.digest[:12]}" if isinstance(value, Suite) else str(value)
