"""What a live server drafted, held against our draft on the same rows."""

import itertools

import torch

from onlinespec.draft.model import Draft
from onlinespec.draft.rows import build_rows, draft_positions
from onlinespec.draft.sample import Sample
from onlinespec.draft.walk import accept_walk, matches
from tests.integration.capture import Capture
from tests.integration.servers import Server, world_prompts

NUM_DRAFT_STEPS = 3


def count_walked(draft: Draft, samples: list[Sample], embed_VD: torch.Tensor) -> int:
    """Accepted drafted tokens; every request's walk must equal what the server counted, step by step."""
    num_correct = 0
    for sample in samples:
        end = sample.num_tokens - 1
        matches_RK = matches(draft, sample, embed_VD, NUM_DRAFT_STEPS)
        walk, live = accept_walk(matches_RK, sample.num_prompt_tokens, end, NUM_DRAFT_STEPS), sample.verify
        assert walk.start == live.start
        assert walk.num_committed == live.num_committed
        truncated = [min(c, end - s) for c, s in zip(live.num_correct, live.start, strict=True)]
        assert walk.num_correct == truncated
        num_correct += sum(truncated)
    return num_correct


def probe(server: Server, capture: Capture, num_prompts: int) -> tuple[list[Sample], list[dict]]:
    """Requests one at a time, and what SGLang's draft said meanwhile (see probe.py)."""
    capture.drain()
    (server.probe / "on").touch()
    _, samples = capture.send(world_prompts(num_prompts, seed=41), concurrency=1, max_tokens=60)
    (server.probe / "on").unlink()
    files = sorted(server.probe.glob("*.pt"))
    records = [torch.load(path) for path in files]
    for path in files:
        path.unlink()
    return samples, records


def verify_steps_of(records: list[dict]) -> list[tuple[int, list[int], dict[int, torch.Tensor]]]:
    """Start, drafted tokens and SGLang's draft logits by position, of each verify step; one request at a time.

    The last logits written for a position are those its drafted token was taken from.
    """
    steps, logits = [], {}
    for record in records:
        if record["kind"] == "verify":
            steps.append((record["start"][0], record["drafted"][0].tolist(), dict(logits)))
        else:
            rows = zip(reversed(record["positions"]), record["logits"].flip(0), strict=False)
            logits.update(rows)
    return steps


def compare_with_probe(
    draft: Draft, samples: list[Sample], records: list[dict], embed_VD: torch.Tensor
) -> tuple[int, float]:
    """Drafted tokens compared, all equal, and the largest difference of a logit between SGLang's draft and ours.

    A step is compared as long as the tokens it was fed are the emitted ones.
    """
    steps = verify_steps_of(records)
    num_compared, largest = 0, 0.0
    for sample in samples:
        positions_N = draft_positions(sample)
        with torch.inference_mode():
            ours_KNW = draft.unroll(build_rows([sample], [positions_N], embed_VD, NUM_DRAFT_STEPS))
        for start, k in itertools.product(sample.verify.start, range(NUM_DRAFT_STEPS)):
            if k == 0:
                found_start, drafted, theirs = steps.pop(0)
                assert found_start == start
            if sample.tokens_T[start : start + k + 1].tolist() != drafted[: k + 1]:
                continue
            ours_W = ours_KNW[k, int((positions_N == start - 1).nonzero())]
            best = int(ours_W.argmax())
            assert drafted[k + 1] == best if draft.target_ids_W is None else int(draft.target_ids_W[best])
            largest = max(largest, float((ours_W - theirs[start - 1 + k]).abs().max()))
            num_compared += 1
    assert not steps
    return num_compared, largest
