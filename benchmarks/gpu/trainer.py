"""Check 5: an optimizer step on a GPU: tokens/s, share of the bf16 peak, peak memory, against the plain recipe there.

ABBA in one process, wall time around a synchronised step; peak is torch's allocator's, of each system alone. The
recipe's batch is the same, and so is its bfloat16. Exits with status 1 where a system did not run.
`--device cpu --shape tiny --systems "plain;math"` tries the script: gradients of flex want CUDA.

Run: python benchmarks/gpu/trainer.py OUT.json [--shape 8b] [--rounds 10] [--device cuda]
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench_trainer_step import NUM_STEPS, SHAPES, build_sample, draft_config
from plain_recipe import PlainTrainer
from provenance import provenance

from onlinespec.config import TrainerConfig
from onlinespec.draft.model import Draft
from onlinespec.trainer.step import Trainer

PEAK_TFLOPS = {"NVIDIA H200": 790.0}
"""bf16 matrix work that was measured on the chip, not its data sheet's; of another chip no share is told"""
REQUESTS = ((512, 256), (900, 120), (300, 400), (1200, 200))
SYSTEMS = {
    "plain": None,
    "math": {"attention": "math"},
    "math, recomputed": {"attention": "math", "checkpoint_activations": True},
    "flex": {"attention": "flex"},
    "flex, recomputed": {"attention": "flex", "checkpoint_activations": True},
    "flex, compiled": {"attention": "flex", "compile": True},
    "flex, muon": {"attention": "flex", "optimizer": "muon"},
    "math, muon": {"attention": "math", "optimizer": "muon"},
}
"""Changes to a trainer with AdamW, as the recipe has; None is the recipe. muon is what `onlinespec serve` takes."""


def build(system: str, shape: str, device: str):
    """(trainer, samples)."""
    config = draft_config(SHAPES[shape])
    torch.manual_seed(0)
    draft = Draft(config)
    embed_VD = torch.randn(config.vocab_size, config.hidden_size)
    samples = [build_sample(config, i, *sizes) for i, sizes in enumerate(REQUESTS)]
    changes = {"optimizer": "adamw", **(SYSTEMS[system] or {})}
    trainer = TrainerConfig(unroll_steps=NUM_STEPS, adamw_lr=1e-4, dtype="bfloat16", device=device, **changes)
    if SYSTEMS[system] is None:
        return PlainTrainer(trainer, draft.to(device), embed_VD.to(device)), samples
    return Trainer(trainer, config, draft.weights(), embed_VD), samples


def timed(trainer, samples, device: str) -> float:
    began_s = time.perf_counter()
    trainer.step(samples)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def measure(system: str, options) -> dict[str, object]:
    """Alone on the device. What does not run says so, and the others go on."""
    gc.collect()  # a compiled draft is part of a cycle, and would stay on the device
    try:
        trainer, samples = build(system, options.shape, options.device)
        timed(trainer, samples[1:2], options.device)  # a short batch first: what is compiled for it must fit them all
        timed(trainer, samples, options.device)
        if options.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        seconds = [timed(trainer, samples, options.device) for _ in range(options.rounds)]
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"system": system, "failed": f"{type(error).__name__}: {str(error)[:500]}"}
    num_answer = sum(answer for _, answer in REQUESTS)
    found = {
        "system": system,
        "answer_tokens_per_s": round(num_answer / statistics.median(seconds), 1),
        "seconds": [round(s, 4) for s in seconds],
    }
    if options.device != "cpu":
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["peak_tflops_frac"] = peak_frac(options.shape, statistics.median(seconds))
    return found


def peak_frac(shape: str, step_s: float) -> float | None:
    """Matrix work of forward and backward, attention's own left out, over the chip's. None for a chip not known."""
    peak = PEAK_TFLOPS.get(torch.cuda.get_device_name())
    if peak is None:
        return None
    config = draft_config(SHAPES[shape])
    draft = Draft(config)
    per_row = sum(p.numel() for name, p in draft.named_parameters() if p.ndim == 2 and not name.startswith("fc."))
    rows = sum(answer for _, answer in REQUESTS)
    context = sum(prompt + answer for prompt, answer in REQUESTS)
    once = draft.fc.weight.numel() + draft.midlayer.self_attn.k_proj.weight.numel() * 2
    flops = 6 * (per_row * rows * NUM_STEPS + once * context)
    return round(flops / step_s / 1e12 / peak, 3)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--systems", default=";".join(SYSTEMS))
    options = parser.parse_args()
    if options.device != "cpu":
        torch.cuda.set_device(torch.device(options.device).index or 0)  # what is timed, and whose memory is read
    rows = []
    for system in options.systems.split(";"):
        rows.append(measure(system, options))
        print(json.dumps(rows[-1]), flush=True)
        name = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
        report = {**provenance(), "device": name, "shape": options.shape, "requests": REQUESTS, "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
