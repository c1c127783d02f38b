"""Check: are captured rows those of a teacher-forced forward, and greedy answers the same while drafts are swapped?

Of one server under load, its prefix cache, overlap scheduling and CUDA graphs as they come.

Rows: hidden states and teacher logits against transformers' forward of the same tokens in float32. bfloat16 is off by
itself: transformers' own bfloat16 forward says by how much, and no row may be off by more than FACTOR times its worst.
A row of another token, or one that a graph's replay overwrote, is off by about its own length.
Answers: the same prompts with the draft left alone and under swaps. Verify steps then hold other tokens, and a batched
bfloat16 forward may take the other of two equal tokens: answers may part only where the target's two best logits are
as near to each other as two logits are wrong.

Run: python benchmarks/gpu/rows.py OUT.json [--target DIR] [--draft DIR]; other flags go to SGLang as they are.
"""

import argparse
import asyncio
import itertools
import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from live import LiveServer, serving
from provenance import provenance

from onlinespec.bench.accept import drive
from onlinespec.bench.client import Answer, Prompt, Sampling
from onlinespec.bench.stream_serve import free_port
from onlinespec.bench.suites import load_suite
from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.config import read_target
from onlinespec.draft.header import aux_layers
from onlinespec.draft.sample import Sample
from onlinespec.trainer.assemble import Assembler
from onlinespec.trainer.prefix import PrefixRows
from onlinespec.wire.messages import RequestEnded, RequestStarted, Rows
from onlinespec.wire.sockets import SampleReceiver
from onlinespec.world import WORLD
from onlinespec.world.hf import AutoModelForCausalLM, AutoTokenizer

FACTOR = 4.0
FLOOR = 2e-4
"""of an error, where the server computes in float32"""
MAX_TOKENS = 96
NUM_USERS = 8
SWAP_EVERY_S = 0.5
MIN_SWAPS = 3


class Samples:
    """Takes what the server sends in a thread, as a sidecar would."""

    def __init__(self, endpoint: str):
        self.found: list[Sample] = []
        self._assembler = Assembler(PrefixRows(2**28), 600, 2**32)
        self._is_done = threading.Event()
        self._receiver = SampleReceiver(endpoint)
        self._thread = threading.Thread(target=self._run, daemon=True)  # a failed check ends at once
        self._thread.start()

    def _run(self) -> None:
        while (received := self._receiver.receive(1.0)) is not None or not self._is_done.is_set():
            if received is None:
                continue
            message, frames = received
            if isinstance(message, RequestStarted):
                self._assembler.start(message)
            elif isinstance(message, Rows):
                self._assembler.rows(message, frames)
            elif isinstance(message, RequestEnded) and (sample := self._assembler.end(message)) is not None:
                self.found.append(sample)
            elif self._is_done.is_set():
                return  # nothing but heartbeats any more

    def close(self) -> list[Sample]:
        self._is_done.set()
        self._thread.join()
        self._receiver.close()
        return self.found


class Reference:
    """transformers' forward of the target."""

    def __init__(self, target: Path, layers: list[int], device: str):
        self.tokenizer = AutoTokenizer.from_pretrained(target)
        self._layers = layers
        self._exact = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).to(device)
        self._rounded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).to(device)
        self._is_rounded = device != "cpu"
        """a CPU serves float32"""

    @torch.inference_mode()
    def _rows(self, model, tokens_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shapes: aux [T, A*D] and logits [T, V], float32 on the host."""
        output = model(tokens_T[None].to(model.device), output_hidden_states=True)
        aux_TA = torch.cat([output.hidden_states[layer][0] for layer in self._layers], dim=-1)
        return aux_TA.float().cpu(), output.logits[0].float().cpu()

    def errors(self, sample: Sample) -> dict[str, torch.Tensor]:
        """Off from float32 by, the server's rows and transformers' own: of aux relative, of logits absolute."""
        has_aux, taught, ids_Tk = sample.has_aux_T, sample.has_teacher_T, sample.teacher_ids_Tk
        aux_TA, logits_TV = self._rows(self._exact, sample.tokens_T)
        own_aux_TA, own_TV = self._rows(self._rounded, sample.tokens_T) if self._is_rounded else (aux_TA, logits_TV)
        length_T = aux_TA.norm(dim=1)
        exact_Tk, own_Tk = (logits.gather(1, ids_Tk)[taught] for logits in (logits_TV, own_TV))
        return {
            "aux": ((sample.aux_TA.float() - aux_TA).norm(dim=1) / length_T)[has_aux],
            "own_aux": ((own_aux_TA - aux_TA).norm(dim=1) / length_T)[has_aux],
            "logits": (sample.teacher_logits_Tk[taught] - exact_Tk).abs().flatten(),
            "own_logits": (own_Tk - exact_Tk).abs().flatten(),
            "lse": (sample.teacher_lse_T - logits_TV.logsumexp(1))[taught].abs(),
            "own_lse": (own_TV.logsumexp(1) - logits_TV.logsumexp(1))[taught].abs(),
        }

    @torch.inference_mode()
    def gap(self, prompt: Prompt, shared: str) -> float:
        """Difference of the two best logits where two answers part; `shared` is what they agree on."""
        head = self.tokenizer.apply_chat_template(list(prompt.messages), tokenize=False, add_generation_prompt=True)
        ids = self.tokenizer(head + shared, add_special_tokens=False, return_tensors="pt")["input_ids"]
        best = self._exact(ids.to(self._exact.device)).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


def ask(server: LiveServer, asked: Sequence[Prompt]) -> list[Answer]:
    """In the order of the prompts."""
    answers = asyncio.run(drive(server.base_url, asked, Sampling(max_tokens=MAX_TOKENS), NUM_USERS))
    failed = [answer.error for answer in answers if answer.error]
    assert not failed, failed[:3]
    return sorted(answers, key=lambda answer: answer.prompt.number)


def ask_under_swaps(server: LiveServer, asked: Sequence[Prompt]) -> list[Answer]:
    """In the order of the prompts, all of them once or more, until there were MIN_SWAPS."""
    _, weights = read_draft(server.paths.version(1))
    other = {n: t + 0.1 * t.std() if t.is_floating_point() and t.ndim > 1 else t for n, t in weights.items()}
    is_done = threading.Event()

    def swap() -> None:
        for turn in itertools.cycle((other, weights)):
            server.swap(turn)
            if is_done.wait(SWAP_EVERY_S):
                return

    swapper = threading.Thread(target=swap, daemon=True)
    swapper.start()
    answers = ask(server, asked)
    while server.num_versions - 1 < MIN_SWAPS and swapper.is_alive():  # a GPU may answer all in the time of two
        answers += ask(server, asked)
    is_done.set()
    swapper.join()
    return answers


def summary(reference: Reference, samples: Sequence[Sample]) -> dict[str, dict]:
    """By what was compared: median and worst error, transformers' own worst, and whether all are near enough."""
    errors = [reference.errors(sample) for sample in samples]
    found = {}
    for name in ("aux", "logits", "lse"):
        of_server, own = (torch.cat([each[key] for each in errors]) for key in (name, f"own_{name}"))
        worst, bound = float(of_server.max()), max(FLOOR, FACTOR * float(own.max()))
        figures = {"median": float(of_server.median()), "worst": worst, "own_worst": float(own.max())}
        found[name] = {"values": len(of_server), **figures, "is_near": worst <= bound}
    return found


def partings(reference: Reference, alone: Sequence[Answer], swapped: Sequence[Answer]) -> list[float]:
    """Logit gaps where answers to the same prompt part; `swapped` may go through the prompts more than once."""
    gaps = []
    for one, two in zip(itertools.cycle(alone), swapped, strict=False):
        if one.text != two.text:
            length = next(i for i in range(len(one.text) + 1) if one.text[: i + 1] != two.text[: i + 1])
            gaps.append(reference.gap(one.prompt, one.text[:length]))
    return gaps


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=Path, default=WORLD)
    parser.add_argument("--draft", default="init")
    parser.add_argument("--requests", type=int, default=100)
    options, flags = parser.parse_known_args()
    asked = load_suite("demo", options.requests, seed=11)
    with serving(free_port(), draft=options.draft, target=options.target, sglang_flags=flags) as server:
        config, _ = read_draft(server.paths.version(1))
        taken = Samples(server.paths.samples_endpoint)
        alone = ask(server, asked)
        samples = taken.close()
        swapped = ask_under_swaps(server, asked)
    layers = aux_layers(config, read_target(options.target).num_layers)
    reference = Reference(options.target, layers, "cuda" if torch.cuda.is_available() else "cpu")
    rows, gaps = summary(reference, samples), partings(reference, alone, swapped)
    report = {
        **provenance(),
        "target": str(options.target),
        "requests": len(asked),
        "samples": len(samples),
        "complete_samples": sum(sample.is_complete for sample in samples),
        "drafts_accepted": sum(answer.num_correct_drafts for answer in alone),
        "answers_under_swaps": len(swapped),
        "swaps": server.num_versions - 1,
        "longest_swap_s": server.longest_swap_s,
        "rows": rows,
        "answers_that_part": len(gaps),
        "gaps_where_they_part": gaps,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    near = 2 * max(FLOOR, FACTOR * rows["logits"]["own_worst"])
    is_fine = all(row["is_near"] for row in rows.values()) and all(gap <= near for gap in gaps)
    return (
        0 if is_fine and len(samples) >= len(asked) and report["swaps"] >= MIN_SWAPS else 1
    )  # SGLang's warm-up is one too


if __name__ == "__main__":
    sys.exit(main())
