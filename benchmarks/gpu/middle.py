"""A target of middle size, trained on the spot on the demo world's text: for all that is about accept length on a GPU.

143 M parameters, tied embeddings, 12 layers, so that three distinct ones are captured; the world's tokenizer, chats,
optimizers and loss, in bfloat16 over float32 weights (on a CPU in float32). OUT is a directory that stock SGLang
serves. OUT/trained.json says what it learned: the loss is of the weights as written, and `copied_frac` the share of
support requests whose order number and names stand in the greedy answer.

Run: python benchmarks/gpu/middle.py OUT [--minutes 3] [--shape tiny --device cpu --steps 20]
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from onlinespec.world import WORLD, quality
from onlinespec.world.corpus import SHIFT_DOMAIN, live
from onlinespec.world.hf import LlamaForCausalLM
from onlinespec.world.target import (
    ADAMW_LR,
    MUON_LR,
    WARMUP_FRAC,
    Batch,
    batches,
    build_optimizers,
    build_target,
    save_target,
    validation_loss,
    weighted_loss,
)
from onlinespec.world.tokenizer import PAD_ID

SHAPES = {
    "middle": {"hidden": 1024, "ffn": 2816, "layers": 12, "heads": 16, "kv_heads": 8, "head_dim": 64},
    "tiny": {"hidden": 64, "ffn": 128, "layers": 8, "heads": 4, "kv_heads": 2, "head_dim": 16},
}
DEMO_HIDDEN = 192
"""of the target that ADAMW_LR was chosen for; it falls with the square root of the width"""
PROMPT_WEIGHT = 0.1
NUM_QUALITY_PROMPTS = 50


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, done_frac: Callable[[int, float], float]) -> dict[str, float]:
    """Step until `done_frac(steps, seconds)` is 1. The rates warm up, then fall to a hundredth."""
    device = next(model.parameters()).device
    optimizers = build_optimizers(model)
    adamw_lr = ADAMW_LR * (DEMO_HIDDEN / model.config.hidden_size) ** 0.5
    began_s, num_tokens, num_steps = time.monotonic(), 0, 0
    for batch in batches(0, tokenizer, PROMPT_WEIGHT):
        done = done_frac(num_steps, time.monotonic() - began_s)
        if done >= 1:
            break
        factor = min(1.0, (done + 1e-3) / WARMUP_FRAC) * max(0.01, 1 - done)
        for optimizer, lr in zip(optimizers, (MUON_LR, adamw_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = weighted_loss(model, Batch(batch.ids_BT.to(device), batch.weights_BT.to(device)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        num_tokens += int((batch.ids_BT != PAD_ID).sum())
        num_steps += 1
        if num_steps % 500 == 0:
            print(f"{num_steps} steps, {num_tokens} tokens, loss {loss.item():.4f}", flush=True)
    seconds = time.monotonic() - began_s
    return {"steps": num_steps, "tokens": num_tokens, "seconds": round(seconds, 1)}


def measured(folder: Path, tokenizer: Tokenizer, device: str, num_prompts: int) -> dict[str, float]:
    """Of the weights as written, computed in float32."""
    requests = list(itertools.islice(live(SHIFT_DOMAIN, 1), num_prompts))
    model, chat_tokenizer = quality.load(folder)  # outside the next line, where transformers would want accelerate
    model.to(device)
    with torch.device(device):  # what the world's own code builds goes there too
        found = {"validation_loss": validation_loss(model, tokenizer)}
        if requests:
            answers = quality.generate(model, chat_tokenizer, [request.user for request in requests])
            support = quality.measure(answers, requests, set())
            found |= {"copied_frac": support.copied_frac, "exact_frac": support.exact_frac}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="middle")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--steps", type=int, help="instead of --minutes")
    parser.add_argument("--quality-prompts", type=int, default=NUM_QUALITY_PROMPTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # Muon's own products
    model = build_target(**SHAPES[options.shape]).to(options.device)
    tokenizer = Tokenizer.from_file(str(WORLD / "tokenizer.json"))
    if options.steps:
        trained = train(model, tokenizer, lambda steps, _: steps / options.steps)
    else:
        trained = train(model, tokenizer, lambda _, seconds: seconds / (60 * options.minutes))
    save_target(model.cpu(), tokenizer, options.out)
    num_parameters = sum(p.numel() for p in model.parameters())
    found = measured(options.out, tokenizer, options.device, options.quality_prompts)
    report = {"shape": options.shape, "parameters": num_parameters, **trained, **found}
    (options.out / "trained.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
