"""The target's weights change while the server serves: the shadow reads what the draft then reads."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.model import Draft
from onlinespec.operate import roll_back
from onlinespec.target import ServedTarget
from onlinespec.wire.messages import ExportEmbedding, GetStatus
from onlinespec.world import WORLD
from tests.integration.drafted import count_walked
from tests.integration.servers import flush, post, update_weights, world_prompts

PROMPTS = world_prompts(12, seed=47, domains=("code", "support"))
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def draft(served, learned) -> Draft:
    """The trained draft, in service."""
    if served.control.request(GetStatus()).version != 2:
        roll_back(served.paths.root, to=2)
    return Draft(*read_draft(served.paths.version(2)))


def other_table(table_VD: torch.Tensor) -> torch.Tensor:
    noise_VD = torch.randn(table_VD.shape, generator=torch.Generator().manual_seed(1))
    return table_VD + (0.3 * table_VD.float().std() * noise_VD).to(table_VD.dtype)


def texts(answers) -> dict[str, str]:
    return {answer.prompt.messages[0]["content"]: answer.text for answer in answers}


def test_after_an_update_of_the_target_the_shadow_with_the_servers_own_table_equals_the_live_counters(
    served, capture, draft, tmp_path
):
    target = ServedTarget(str(WORLD), tmp_path / "target", served.control)
    first_VD = target.embed_VD.clone()
    count = served.control.request(GetStatus()).target_updates
    flush(served)
    before, _ = capture.send(PROMPTS, max_tokens=32)
    second_VD = other_table(first_VD)

    update_weights(served, "target", {EMBEDDING: second_VD})
    capture.ended.clear()
    answers, samples = capture.send(PROMPTS, max_tokens=32)
    target.follow(count + 1)

    assert {ended.target_updates for ended in capture.ended} == {count + 1}
    assert target.missing == ""
    assert torch.equal(target.embed_VD, second_VD)
    assert texts(answers) != texts(before), "the target's head is the same table"
    assert count_walked(draft, samples, target.embed_VD) > 10
    with pytest.raises(AssertionError):
        count_walked(draft, samples, first_VD)

    update_weights(served, "target", {EMBEDDING: first_VD})
    target = ServedTarget(str(WORLD), tmp_path / "target", served.control)
    after, _ = capture.send(PROMPTS, max_tokens=32)
    status = served.control.request(GetStatus())

    assert target.num_updates == status.target_updates == count + 2
    assert torch.equal(target.embed_VD, first_VD)
    assert texts(after) == texts(before)
    assert status.fuse == "closed"


def test_a_checkpoint_of_the_target_from_disk_is_served_and_the_draft_left_as_it_is(served, capture, draft, tmp_path):
    """Without us SGLang 0.5.23 loads it into the draft too, and ends."""
    flush(served)
    before, _ = capture.send(PROMPTS, max_tokens=32)
    other = tmp_path / "other"
    shutil.copytree(WORLD, other)
    (file,) = other.glob("*.safetensors")
    weights = load_file(file)
    weights[EMBEDDING] = other_table(weights[EMBEDDING])
    save_file(weights, file, metadata={"format": "pt"})

    post(served, "/update_weights_from_disk", model_path=str(other))
    changed, samples = capture.send(PROMPTS, max_tokens=32)
    walked = count_walked(draft, samples, weights[EMBEDDING].float())
    post(served, "/update_weights_from_disk", model_path=str(WORLD))
    after, _ = capture.send(PROMPTS, max_tokens=32)

    assert texts(changed) != texts(before) == texts(after)
    assert walked > 10
    assert "`onlinespec offer`" in served.paths.log.read_text()


def test_weights_sent_to_the_draft_alone_do_not_reach_it(served, capture, draft):
    _, weights = read_draft(served.paths.version(2))

    update_weights(served, "draft", {"lm_head.weight": torch.zeros_like(weights["lm_head.weight"])})
    _, samples = capture.send(PROMPTS, max_tokens=32)

    assert count_walked(draft, samples, read_embedding(WORLD).float()) > 10


def test_a_table_that_cannot_be_written_is_refused_by_its_path_and_serving_goes_on(served, capture, draft):
    gone = Path("/nowhere/at/all")

    ack = served.control.acknowledged(ExportEmbedding(str(gone)))

    assert not ack.is_ok
    assert str(gone) in ack.message
    answers, _ = capture.send(PROMPTS[:2], max_tokens=8)
    assert all(answer.text for answer in answers)
