"""Where prompts come from: the demo's domains or a JSONL file. Nothing is downloaded."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from onlinespec.bench.client import Prompt
from onlinespec.errors import BenchError
from onlinespec.world.corpus import DOMAINS, prompts


def load_suite(source: str, num_prompts: int, seed: int) -> list[Prompt]:
    """Prompts of `demo` (all domains in turn), `demo:DOMAIN`, or a JSONL path.

    A JSONL line holds "prompt" (text) or "messages" (OpenAI chat), and may hold "domain".
    Raises: BenchError naming the source, or the file's line, and what was wanted.
    """
    if source == "demo" or source.startswith("demo:"):
        wanted = source.partition(":")[2]
        if wanted and wanted not in DOMAINS:
            raise BenchError(f"suite {source}: no such demo domain; wanted one of {', '.join(DOMAINS)}")
        domains = [wanted] if wanted else list(DOMAINS)
        streams = [(domain, prompts(domain, seed)) for domain in domains]
        turns = itertools.cycle(streams)
        return [Prompt.of_text(domain, next(stream)) for domain, stream in itertools.islice(turns, num_prompts)]
    path = Path(source)
    if not path.is_file():
        raise BenchError(f"suite {source}: no such file; give `demo`, `demo:DOMAIN` or the path of a JSONL file")
    found = list(itertools.islice(_read_jsonl(path), num_prompts))
    if not found:
        raise BenchError(f"{path}: no prompts in it; wanted one JSON object per line")
    return found


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise BenchError(f"{path}:{number}: not JSON ({error.msg}); wanted one object per line") from error
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
