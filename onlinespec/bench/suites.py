"""Where prompts come from: the demo's domains, a public benchmark's file, or a JSONL file. Nothing is downloaded."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

from onlinespec.bench.client import Prompt
from onlinespec.bench.formats import FORMATS, read_jsonl
from onlinespec.errors import BenchError
from onlinespec.world.corpus import DOMAINS, prompts

RANDOM = {"random", "random-ids", "generated-shared-prefix", "gsp"}
"""data sets of random tokens, as SGLang 0.5.23 benchmark/datasets and its older scripts name them"""
WANTED = f"`demo`, `demo:DOMAIN`, NAME:PATH with NAME one of {', '.join(FORMATS)}, or the path of a JSONL file"


def load_suite(source: str, num_prompts: int, seed: int) -> list[Prompt]:
    """Prompts of `demo` (all domains in turn), `demo:DOMAIN`, `NAME:PATH` of a public benchmark, or a JSONL path.

    A benchmark's file that holds more is drawn from with the seed, in the file's order, so that its categories keep
    their shares; of a plain JSONL file the first are taken. A JSONL line holds "prompt" (text) or "messages" (OpenAI
    chat), and may hold "domain".
    Raises: BenchError naming the source, or the file's line, and what was wanted.
    """
    name, _, rest = source.partition(":")
    if name.replace("_", "-") in RANDOM:
        raise BenchError(
            f"suite {source}: random tokens are no language, and how many of them a draft guesses says nothing of"
            f" text; give {WANTED}"
        )
    if name == "demo":
        found = _demo(source, rest, num_prompts, seed)
    elif name in FORMATS:
        found = FORMATS[name].load(rest)
        if len(found) > num_prompts:
            found = [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), num_prompts))]
    else:
        found = _plain(source, num_prompts)
    return [replace(prompt, number=number) for number, prompt in enumerate(found)]


def _demo(source: str, domain: str, num_prompts: int, seed: int) -> list[Prompt]:
    if domain and domain not in DOMAINS:
        raise BenchError(f"suite {source}: no such demo domain; wanted one of {', '.join(DOMAINS)}")
    streams = [(domain, prompts(domain, seed)) for domain in ([domain] if domain else DOMAINS)]
    turns = itertools.islice(itertools.cycle(streams), num_prompts)
    return [Prompt.of_text(domain, next(stream)) for domain, stream in turns]


def _plain(source: str, num_prompts: int) -> list[Prompt]:
    path = Path(source)
    if not path.is_file():
        raise BenchError(f"suite {source}: no such file; give {WANTED}")
    found = list(itertools.islice(read_jsonl(path), num_prompts))
    if not found:
        raise BenchError(f"{path}: no prompts in it; wanted one JSON object per line")
    return found
