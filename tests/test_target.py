"""What the trainer and the shadow read of the target, when its weights were updated in the server."""

import re

import pytest
import torch
from safetensors.torch import save_file

from onlinespec.target import ServedTarget
from onlinespec.wire.sockets import ControlClient
from tests.draft.tiny import write_target
from tests.fake_server import FakeServer, lay_out


@pytest.fixture
def served(tmp_path):
    """A server, the model it started with, and where it may write."""
    paths = lay_out(tmp_path / "run")
    model = write_target(tmp_path / "model")
    return FakeServer(paths, 3), ControlClient(paths.control_endpoint), model, paths.exported_target


def test_without_an_update_the_table_is_the_files(served):
    server, control, model, exported = served
    server.embedding = [torch.zeros(29, 16)]

    target = ServedTarget(str(model), exported, control)

    assert (target.num_updates, target.missing) == (0, "")
    assert target.embed_VD.abs().sum() > 0


def test_the_servers_table_replaces_the_files_in_place_from_all_ranks_in_the_order_of_their_rows(served):
    server, control, model, exported = served
    target = ServedTarget(str(model), exported, control)
    held = target.embed_VD
    table = torch.randn(held.shape).bfloat16()
    server.embedding = [table[:20].clone(), table[20:].clone()]

    target.follow(3)

    assert torch.equal(held, table.float())
    assert (target.num_updates, target.missing) == (3, "")
    assert not exported.exists()


def test_a_sidecar_that_starts_after_an_update_asks_at_once(served):
    server, control, model, exported = served
    server.target_updates, server.embedding = 2, [torch.ones(29, 16)]

    target = ServedTarget(str(model), exported, control)

    assert target.num_updates == 2
    assert bool((target.embed_VD == 1).all())


@pytest.mark.parametrize(
    ("parts", "refusal", "found"),
    [
        ([], "", r"0 rows of width \[\]"),
        ([(20, 16)], "", r"20 rows of width \[16\].*\(29, 16\)"),
        ([(29, 8)], "", r"29 rows of width \[8\]"),
        ([(29, 16)], "no space left", "no space left"),
    ],
)
def test_what_is_no_whole_table_leaves_the_old_one_and_says_why_until_the_next_try(served, parts, refusal, found):
    server, control, model, exported = served
    target = ServedTarget(str(model), exported, control)
    before = target.embed_VD.clone()
    server.embedding, server.refusal = [torch.ones(shape) for shape in parts], refusal

    target.follow(1)

    assert torch.equal(target.embed_VD, before)
    assert re.search(found, target.missing)

    server.embedding, server.refusal = [torch.ones(29, 16)], ""
    target.follow(1)
    assert target.missing == ""


def test_a_file_that_is_cut_short_is_no_table(served):
    _, control, model, exported = served
    target = ServedTarget(str(model), exported, control)
    exported.mkdir()
    save_file({"embed_tokens.weight": torch.ones(29, 16)}, exported / "0.safetensors")
    (exported / "0.safetensors").write_bytes((exported / "0.safetensors").read_bytes()[:-8])

    assert "cannot be read" in target._read()
