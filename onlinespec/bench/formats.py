"""The files of public benchmarks, read as their authors publish them, and plain JSONL.

Each prompt is the benchmark's own text, sent as one user message without a system message or examples before it;
HumanEval's, the head of a function, comes with one sentence that asks to complete it. Fields: MT-Bench, FastChat
fastchat/llm_judge/data/mt_bench/question.jsonl; GSM8K, openai/grade-school-math; HumanEval, openai/human-eval;
MATH500, HuggingFaceH4/MATH-500 (or prm800k's split of it); ShareGPT, SGLang 0.5.23 benchmark/datasets/sharegpt.py.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from onlinespec.bench.client import Prompt
from onlinespec.errors import BenchError

_HUMANS = ("human", "user")


class _MtBench(msgspec.Struct):
    category: str
    turns: Annotated[list[str], msgspec.Meta(min_length=1)]

    def prompt(self) -> Prompt:
        first, *others = self.turns
        return Prompt(self.category, ({"role": "user", "content": first},), tuple(others))


class _Gsm8k(msgspec.Struct):
    question: str

    def prompt(self) -> Prompt:
        return Prompt.of_text("gsm8k", self.question)


class _HumanEval(msgspec.Struct):
    task_id: str
    head: str = msgspec.field(name="prompt")

    def prompt(self) -> Prompt:
        asked = f"Complete this Python function. Answer with its code.\n\n```python\n{self.head.strip()}\n```"
        return Prompt.of_text("humaneval", asked)


class _Math500(msgspec.Struct):
    problem: str
    subject: str = "math500"

    def prompt(self) -> Prompt:
        return Prompt.of_text(self.subject, self.problem)


class _Said(msgspec.Struct):
    value: str
    speaker: str = msgspec.field(name="from")


class _ShareGpt(msgspec.Struct):
    conversations: list[_Said]

    def turns(self) -> list[str]:
        return [said.value for said in self.conversations if said.speaker in _HUMANS and said.value.strip()]


@dataclass(frozen=True)
class Format:
    """How one benchmark's file is read. where: the file's name and where its owner publishes it."""

    name: str
    where: str
    read: Callable[[Path], Iterator[Prompt]]

    def load(self, path_text: str) -> list[Prompt]:
        """Every prompt of the file. Raises: BenchError naming the file, or its line, and what was wanted."""
        path = Path(path_text)
        if not path_text or not path.is_file():
            found = f"no file {path_text}" if path_text else "no path"
            raise BenchError(f"suite {self.name}: {found}; download {self.where}, and give {self.name}:PATH of it")
        prompts = list(self.read(path))
        if not prompts:
            raise BenchError(f"{path}: no prompts in it; wanted {self.where}")
        return prompts


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1; a .gz file is unpacked."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError) as error:
        raise BenchError(f"{path}: {error}; it is damaged, download it again") from error


def _jsonl(row: type[Any]) -> Callable[[Path], Iterator[Prompt]]:
    def read(path: Path) -> Iterator[Prompt]:
        for number, line in _lines(path):
            try:
                yield msgspec.json.decode(line, type=row).prompt()
            except msgspec.MsgspecError as error:
                wanted = ", ".join(field.encode_name for field in msgspec.structs.fields(row))
                raise BenchError(f"{path}:{number}: {error}; wanted one JSON object a line, with {wanted}") from error

    return read


def _sharegpt(num_turns: int | None) -> Callable[[Path], Iterator[Prompt]]:
    def read(path: Path) -> Iterator[Prompt]:
        try:
            chats = msgspec.json.decode(path.read_bytes(), type=list[_ShareGpt])
        except msgspec.MsgspecError as error:
            wanted = 'a JSON list of {"conversations": [{"from": "human", "value": TEXT}, ...]}'
            raise BenchError(f"{path}: {error}; wanted {wanted}") from error
        for turns in filter(None, (chat.turns()[:num_turns] for chat in chats)):
            yield Prompt("sharegpt", ({"role": "user", "content": turns[0]},), tuple(turns[1:]))

    return read


_SHAREGPT = (
    "ShareGPT_V3_unfiltered_cleaned_split.json from"
    " https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered"
)
FORMATS = {
    known.name: known
    for known in (
        Format(
            "mtbench",
            "question.jsonl from https://github.com/lm-sys/FastChat (fastchat/llm_judge/data/mt_bench)",
            _jsonl(_MtBench),
        ),
        Format(
            "gsm8k",
            "test.jsonl from https://github.com/openai/grade-school-math (grade_school_math/data)",
            _jsonl(_Gsm8k),
        ),
        Format("humaneval", "HumanEval.jsonl.gz from https://github.com/openai/human-eval (data)", _jsonl(_HumanEval)),
        Format("math500", "test.jsonl from https://huggingface.co/datasets/HuggingFaceH4/MATH-500", _jsonl(_Math500)),
        Format("sharegpt", _SHAREGPT, _sharegpt(1)),
        Format("sharegpt-turns", _SHAREGPT, _sharegpt(None)),
    )
}
"""`sharegpt` asks the first human turn of a conversation, `sharegpt-turns` all of them"""


def read_jsonl(path: Path) -> Iterator[Prompt]:
    """Plain prompts, one object a line: "prompt" (text) or "messages" (OpenAI chat), and "domain" if wanted.

    Raises: BenchError naming the file and its line.
    """
    for number, line in _lines(path):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise BenchError(f"{path}:{number}: not JSON ({error}); wanted one object per line") from error
        domain = str(entry.get("domain", path.stem)) if isinstance(entry, dict) else ""
        if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
            yield Prompt.of_text(domain, entry["prompt"])
        elif isinstance(entry, dict) and _is_chat(entry.get("messages")):
            yield Prompt(domain, tuple(entry["messages"]))
        else:
            raise BenchError(f'{path}:{number}: wanted {{"prompt": text}} or {{"messages": [...]}}')


def _is_chat(messages: object) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages)
    )
