"""Rare settings on the real server, by `make test-full`: trees, and tensor parallelism over gloo."""

import pytest
import torch

from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.model import Draft
from onlinespec.draft.walk import accept_walk, matches
from onlinespec.operate import roll_back
from onlinespec.wire.messages import GetHello, GetStatus, SetCapture
from onlinespec.world import WORLD
from tests.integration.capture import Capture
from tests.integration.conftest import IDENTITY_TOKENS, learn
from tests.integration.servers import flush, free_port, send, start_ours, world_prompts

pytestmark = pytest.mark.full
NUM_DRAFT_STEPS = 3


def test_a_tree_is_served_without_capture_and_says_so(tmp_path, plain_answers, identity_prompts):
    flags = ["--speculative-eagle-topk", "4", "--speculative-num-draft-tokens", "8"]
    server = start_ours(tmp_path / "tree", free_port(), flags=flags)

    hello = server.control.request(GetHello())
    refused = server.control.acknowledged(SetCapture(True))
    answers = send(server, identity_prompts[:32], max_tokens=IDENTITY_TOKENS)
    stopped = server.stop()

    assert not hello.capture
    assert "trees" in hello.capture_refused
    assert not refused.is_ok
    assert "serving without capture: --speculative-eagle-topk 4" in server.log_text()
    same = [answer.text == plain_answers[answer.prompt.messages[0]["content"]] for answer in answers]
    assert sum(same) >= 31, "one near-tie may fall otherwise"
    assert stopped == 0


def test_tensor_parallel_ranks_swap_at_once_and_rows_come_from_rank_zero_only(tmp_path):
    server = start_ours(tmp_path / "tp", free_port(), sets=["supervisor.sidecar=false"], flags=["--tp-size", "2"])
    capture = Capture(server)
    learn(server)
    before = server.control.request(GetStatus())

    roll_back(server.paths.root, to=1)
    roll_back(server.paths.root, to=2)
    flush(server)
    config, weights = read_draft(server.paths.version(2))
    _, samples = capture.send(world_prompts(12, seed=43), max_tokens=80)
    capture.close()
    status = server.control.request(GetStatus())
    stopped = server.stop()

    draft, embed_VD = Draft(config, weights), read_embedding(WORLD).float()
    num_correct = 0
    for sample in samples:
        end = sample.num_tokens - 1
        walk = accept_walk(
            matches(draft, sample, embed_VD, NUM_DRAFT_STEPS), sample.num_prompt_tokens, end, NUM_DRAFT_STEPS
        )
        live = [min(c, end - s) for c, s in zip(sample.verify.num_correct, sample.verify.start, strict=True)]
        num_correct += sum(live)
        assert walk.num_correct == live
    assert status.num_swaps == before.num_swaps + 2
    assert status.fuse == "closed"
    assert num_correct > 20
    assert len(samples) == 12
    assert stopped == 0
    assert torch.isfinite(samples[0].aux_TA).all()
