"""What `make gpu` measures: the checks, risky ones first, as commands, and the models that they need made here.

A part is one command that ends within ten minutes. OUT stands for the folder of results.
"""

import itertools
import sys
from dataclasses import dataclass

PYTHON = sys.executable
PART_S = 540
Words = tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """goal: in words, for whoever reads the figures. parts: a command each. needs: of PREPARED. limit_s: of a part.
    goes_on: a part played again adds to its JSON; else it begins anew. has_counters: rests on what SGLang's OpenAI API
    tells of a request's verify steps."""

    name: str
    question: str
    goal: str
    parts: tuple[Words, ...]
    needs: Words = ()
    has_server: bool = True
    goes_on: bool = False
    has_counters: bool = False
    limit_s: int = PART_S


def script(name: str, *words: str) -> Words:
    return (PYTHON, f"benchmarks/{name}.py", *words)


def onlinespec(*words: str) -> Words:
    return (PYTHON, "-m", "onlinespec.cli", *words)


def sets(*overrides: str) -> Words:
    return tuple(itertools.chain.from_iterable(("--set", override) for override in overrides))


MIDDLE = ("--target", "OUT/middle")
FITTED = (*MIDDLE, "--draft", "OUT/first/train/draft")
ON_GPU = sets("trainer.device=cuda", "trainer.dtype=bfloat16")
MIDDLE_LOOP = ("--config", "configs/demo.yaml", *ON_GPU)
TRUE_SIZE = ("--target", "OUT/shapes", "--draft", "init:OUT/shapes/draft")
ROOM = ("--mem-fraction-static", "0.7")
"""the trainer, some 13 GB by its parameters, and two resident drafts want a place on the same GPU"""
SEATS = ("--max-running-requests", "64")
"""SGLang's default is 48 with a draft and more without one"""
SGLANG_FLAGS = (ROOM[0], SEATS[0])
# A row of this shape is 3 * 4096 * 2 = 24,576 bytes, 132 more with a teacher: 18.9 MB on the wire for an answer of 256
# tokens to a prompt of 512. What is queued waits in the ring, where verify passes lie whole: 512 * 24,576 + 256 * 4 *
# 24,708 = 37.9 MB at accept length 1. Of a sidecar that is busy, a ring of 16 GiB and a queue of 8 hold 116,000 output
# tokens: no row is to be dropped while costs are measured. 64 requests in flight hold 1.2 GB in the assembler.
ROWS_8B = sets("capture.ring_bytes=17179869184", "capture.queue_bytes=8589934592", "buffer.open_bytes=4294967296")
PAIRS = ("--suite", "OUT/shapes/prompts.jsonl", "--max-tokens", "256", "--pairs", "20", "--block-seconds", "4")
# The trainer's state is some 6 GB here and is written in the sidecar's one loop: at the end, and not in between.
OVERHEAD = (*TRUE_SIZE, *PAIRS, "--swaps", "0", *ROWS_8B, *ON_GPU, *sets("trainer.checkpoint_s=3600"))
GPU_TESTS = ("tests/draft/test_flex.py", "tests/plugin/test_device.py", "tests/plugin/test_teacher.py")
"""`rows` does not reach the teacher's kernel, which wants a larger vocabulary than the world's"""
REQUESTS = {"1": "300", "8": "1500", "32": "4000", "64": "8000"}
"""by users, of a phase: meant for about a minute each, which nothing has measured"""

PREPARED = {
    "middle": (420, script("gpu/middle", "OUT/middle")),
    "first": (150, script("first_draft", "OUT/first", *MIDDLE, *ON_GPU)),
    "shapes": (180, script("gpu/shapes", "OUT/shapes")),
}
"""Name in OUT -> seconds it may want, by guess, and the command; each may need those before it."""

CHECKS = (
    Check(
        "kernels",
        "Do our own kernel, streams and events do on this chip what they are meant to?",
        "every test that wants a GPU passes",
        ((PYTHON, "-m", "pytest", "-q", "-rs", "-W", "default", *GPU_TESTS),),
        has_server=False,
    ),
    Check(
        "boots",
        "Does SGLang serve here at all with us inside, and are the rows of the demo's own target right?",
        "as `rows`, at 3.3 M parameters and without training anything first",
        (script("gpu/rows", "OUT/boots.json"),),
    ),
    Check(
        "rows",
        "Are rows right under overlap and CUDA graphs, answers the same under swaps, and does the shadow equal the "
        "live counters, sampling too?",
        "rows within bfloat16's own error; answers part only at near-ties; walks equal as integers, or live minus "
        "shadow below 0.01",
        (
            script("gpu/rows", "OUT/rows.json", *FITTED),
            script(
                "bench_shadow_fidelity", "OUT/fidelity-greedy.json", "--device", "cuda", "--seconds", "480", *FITTED
            ),
            script(
                *("bench_shadow_fidelity", "OUT/fidelity-sampled.json", "--temperature", "0.7"),
                *("--device", "cuda", "--seconds", "480", *FITTED),
            ),
        ),
        needs=("middle", "first"),
        goes_on=True,
    ),
    Check(
        "closes",
        "Does the loop close with CUDA graphs, overlap scheduling and radix cache on?",
        "every check of the demo: accept length rises, swaps, rollback",
        (onlinespec("demo", "--tokens", "100000", "--run-dir", "OUT/demo", *MIDDLE, *ON_GPU),),
        needs=("middle",),
        has_counters=True,
    ),
    Check(
        "tap",
        "What does the tap cost at 1, 8, 32, 64 requests on Llama-3.1-8B's shape?",
        "tokens/s at most 0.5 % less, p99 between tokens at most 1 % more, no row dropped",
        tuple(
            onlinespec(
                *("bench", "overhead", "--json", f"OUT/tap-{users}.json", "--concurrency", users),
                *(*OVERHEAD, *sets("pace.duty_frac=0.1"), *ROOM, *SEATS),
            )
            for users in ("1", "8", "32", "64")
        ),
        needs=("shapes",),
        goes_on=True,
    ),
    Check(
        "swap",
        "How long is the longest gap between tokens at a swap of a draft of the true size?",
        "within one decode step; floor 2 x bytes / 4.3 TB/s",
        (script("bench_swap", "OUT/swap.json", "--streams", "1", "16", *TRUE_SIZE, *ROOM),),
        needs=("shapes",),
    ),
    Check(
        "trainer",
        "How fast does a step train on Llama-3.1-8B's shape, in how much memory?",
        "above the plain recipe in both",
        (script("gpu/trainer", "OUT/trainer.json"),),
        has_server=False,
    ),
    Check(
        "duty",
        "What does training on the server's own GPU cost it at 10, 30, 60 % duty?",
        "tokens/s and p99 over those with the tap alone; no goal yet",
        tuple(
            onlinespec(
                *("bench", "overhead", "--json", f"OUT/duty-{duty}.json", "--concurrency", "16"),
                *(*OVERHEAD, *sets(f"pace.duty_frac={duty}", "trainer.max_memory_gb=30"), *ROOM),
            )
            for duty in ("0.1", "0.3", "0.6")
        ),
        needs=("shapes",),
        goes_on=True,
    ),
    Check(
        "goodput",
        "What is it worth after a shift at 1, 8, 32, 64 users, against a frozen draft and no speculation?",
        "0.98 of no speculation in every phase; more than the frozen draft after the shift",
        tuple(
            onlinespec(
                *("bench", "stream", "--json", f"OUT/goodput-{users}.json", "--arms", "none;frozen;onlinespec"),
                *("--concurrency", users, "--requests", requests, *FITTED, *MIDDLE_LOOP, *SEATS),
            )
            for users, requests in REQUESTS.items()
        ),
        needs=("middle", "first"),
        goes_on=True,
        has_counters=True,
    ),
    Check(
        "profile",
        "Where does a decode step's time go with the tap on, on Llama-3.1-8B's shape?",
        "names the next bottleneck",
        (
            script(
                *("gpu/decode_profile", "OUT/profile.json", *TRUE_SIZE),
                *("--suite", "OUT/shapes/prompts.jsonl", *ROOM),
            ),
        ),
        needs=("shapes",),
    ),
)
