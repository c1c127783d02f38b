"""Tokens/s and peak memory of an optimizer step, against a plain implementation of the common recipe.

Both get the same requests, threads, dtype (float32 unless named), unroll, decay and AdamW; first it is checked that
they give the same loss and gradients on a batch. Speed in one process, ABBA, in CPU seconds of the thread. Memory in
a process of its own each: peak RSS during a second step, and of that what is above the process with torch loaded
(`peak`: weights, optimizer, averages, requests, activations) and above the state between two steps (`step`:
activations and logits).

Run: python benchmarks/bench_trainer_step.py OUT.json [--shapes tiny,middle] [--rounds 5]
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from plain_recipe import PlainTrainer, loss_of
from provenance import provenance

from onlinespec.config import TrainerConfig
from onlinespec.draft.config import DraftConfig
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.trainer.step import Trainer

NUM_STEPS = 7
TOP_K = 16
SHAPES = {
    "tiny": {"hidden": 192, "ffn": 384, "heads": (4, 2, 64), "vocab": 1792},
    "middle": {"hidden": 768, "ffn": 2048, "heads": (12, 4, 64), "vocab": 16384},
    "8b": {"hidden": 4096, "ffn": 14336, "heads": (32, 8, 128), "vocab": 32000},
}
# Prompt and answer tokens of a batch's requests: chats of mixed length, and one without prompts or padding to gain on.
TRAFFIC = {
    "chats": ((40, 90), (220, 60), (120, 150), (300, 40)),
    "no padding, no prompt": ((1, 128), (1, 128), (1, 128), (1, 128)),
}
SYSTEMS = {
    "plain": {},
    "ours": {"optimizer": "adamw"},
    "ours, muon": {"optimizer": "muon"},
    "ours, muon, stable": {"optimizer": "muon", "kv_mode": "stable"},
    "ours, activations recomputed": {"optimizer": "adamw", "checkpoint_activations": True},
    "plain, bfloat16": {"dtype": "bfloat16"},
    "ours, bfloat16": {"optimizer": "adamw", "dtype": "bfloat16"},
    "ours, muon, bfloat16": {"optimizer": "muon", "dtype": "bfloat16"},
}


def draft_config(shape):
    heads, kv_heads, head_dim = shape["heads"]
    return DraftConfig(
        hidden_size=shape["hidden"],
        target_hidden_size=shape["hidden"],
        intermediate_size=shape["ffn"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=shape["vocab"],
        draft_vocab_size=shape["vocab"],
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=2048,
    )


def build_sample(config, seed, num_prompt, num_answer):
    """Noise of the right shape; all of the teacher's mass is in its top k."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_prompt + num_answer
    position_T = torch.arange(num_tokens)
    ids = torch.rand(num_tokens, config.vocab_size, generator=generator).topk(TOP_K).indices
    logits = torch.randn(num_tokens, TOP_K, generator=generator).sort(descending=True).values
    return Sample(
        request=seed,
        tenant="",
        num_prompt_tokens=num_prompt,
        temperature=1.0,
        tokens_T=torch.randint(config.vocab_size, (num_tokens,), generator=generator),
        aux_TA=torch.randn(num_tokens, config.num_aux * config.target_hidden_size, generator=generator),
        has_aux_T=position_T < num_tokens - 1,
        teacher_ids_Tk=ids,
        teacher_logits_Tk=logits,
        teacher_lse_T=logits.logsumexp(-1),
        has_teacher_T=(position_T >= num_prompt) & (position_T < num_tokens - 1),
        verify=VerifySteps(),
        finish_reason="stop",
        started_s=0.0,
        ended_s=0.0,
    )


def build(shape_name, traffic_name, system):
    """(trainer, samples) of one system; the same weights for the same shape."""
    config = draft_config(SHAPES[shape_name])
    torch.manual_seed(0)
    draft = Draft(config)
    embed_VD = torch.randn(config.vocab_size, config.hidden_size)
    samples = [build_sample(config, i, *sizes) for i, sizes in enumerate(TRAFFIC[traffic_name])]
    common = {"unroll_steps": NUM_STEPS, "ema_decay": 0.0, "adamw_lr": 1e-4, "dtype": "float32"}
    trainer_config = TrainerConfig(**{**common, **SYSTEMS[system]})
    if system.startswith("plain"):
        return PlainTrainer(trainer_config, draft, embed_VD), samples
    return Trainer(trainer_config, config, draft.weights(), embed_VD), samples


def check_equal(shape_name):
    """Largest relative difference of loss and of gradients between the two."""
    plain, samples = build(shape_name, "chats", "plain")
    ours, _ = build(shape_name, "chats", "ours")
    loss = loss_of(plain.draft, samples, plain.embed_VD, NUM_STEPS, plain.config.loss_decay)
    loss.backward()
    found = {}
    ours._optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in ours.draft.named_parameters()})
    ours._optimizer.clip = lambda: 0.0
    result = ours.step(samples)
    gradients = {name: p.grad for name, p in plain.draft.named_parameters()}
    worst = max(float((found[n] - g).norm() / g.norm()) for n, g in gradients.items())
    difference = abs(result.loss - float(loss.detach())) / float(loss.detach())
    assert difference < 1e-4, f"losses differ: {result.loss}, {float(loss)}"
    assert worst < 1e-3, f"gradients differ by {worst}"
    return {"loss": difference, "gradient": worst}


def speed(shape_name, traffic_name, systems, rounds):
    """Seconds of each step, systems in ABBA order, after one unmeasured step each."""
    built = {system: build(shape_name, traffic_name, system) for system in systems}
    for trainer, samples in built.values():
        trainer.step(samples)
    seconds = {system: [] for system in systems}
    for number in range(rounds):
        for system in systems if number % 2 == 0 else reversed(systems):
            trainer, samples = built[system]
            began_s = time.thread_time()
            trainer.step(samples)
            seconds[system].append(time.thread_time() - began_s)
    return seconds


def rss_bytes(name):
    """VmRSS, or VmHWM since it was last reset. Source: proc(5), /proc/PID/status and clear_refs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def memory(shape_name, traffic_name, system):
    """In a process of its own; see the module's docstring."""
    command = [sys.executable, __file__, "--memory-of", shape_name, traffic_name, system]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_memory(shape_name, traffic_name, system):
    empty = rss_bytes("VmRSS")
    trainer, samples = build(shape_name, traffic_name, system)
    trainer.step(samples)
    gc.collect()
    between = rss_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    trainer.step(samples)
    peak = rss_bytes("VmHWM")
    print(json.dumps({"peak_bytes": peak - empty, "step_bytes": peak - between}))


def measure(shape_name, traffic_name, systems, rounds):
    seconds = speed(shape_name, traffic_name, systems, rounds)
    num_tokens = sum(answer for _, answer in TRAFFIC[traffic_name])
    rows = []
    for system in systems:
        ratios = sorted(p / o for p, o in zip(seconds["plain"], seconds[system], strict=True))
        used = memory(shape_name, traffic_name, system)
        rows.append(
            {
                "shape": shape_name,
                "traffic": traffic_name,
                "system": system,
                "answer_tokens_per_cpu_s": round(num_tokens / statistics.median(seconds[system]), 1),
                "speed_ratio": [round(r, 2) for r in (statistics.median(ratios), ratios[0], ratios[-1])],
                "peak_mib": round(used["peak_bytes"] / 2**20, 1),
                "step_mib": round(used["step_bytes"] / 2**20, 1),
                "seconds": [round(s, 3) for s in seconds[system]],
            }
        )
    for row in rows:
        row["peak_ratio"] = round(row["peak_mib"] / rows[0]["peak_mib"], 3)
        print(json.dumps(row), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?")
    parser.add_argument("--shapes", default="tiny,middle")
    parser.add_argument("--systems", default=";".join(SYSTEMS), help="with semicolons between; plain is always there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", nargs=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print_memory(*options.memory_of)
        return
    rows, equal = [], {}
    systems = list(dict.fromkeys(["plain", *options.systems.split(";")]))
    for shape_name in options.shapes.split(","):
        equal[shape_name] = check_equal(shape_name)
        print(f"{shape_name}: relative differences {equal[shape_name]}", flush=True)
        for traffic_name in TRAFFIC:
            rows += measure(shape_name, traffic_name, systems, options.rounds)
    report = {**provenance(), "unroll_steps": NUM_STEPS, "relative_differences": equal, "rows": rows}
    with open(options.out, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
