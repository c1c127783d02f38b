"""Drafts of other shapes than the default one on the real server, by `make test-full`: ours is SGLang's."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.config import DraftConfig, read_target
from onlinespec.draft.fresh import fresh_config, read_embedding
from onlinespec.draft.header import aux_layers
from onlinespec.draft.model import Draft
from onlinespec.wire.messages import GetHello, GetStatus
from onlinespec.world import WORLD
from tests.integration.capture import Capture
from tests.integration.conftest import learn
from tests.integration.drafted import compare_with_probe, count_walked, probe
from tests.integration.servers import flush, free_port, start_ours, world_prompts

pytestmark = pytest.mark.full

SHAPES: dict[str, Callable[[DraftConfig], DraftConfig]] = {
    "EAGLE-3.1 of two layers with heads, ffn and captured layers of its own": lambda base: replace(
        base,
        num_layers=2,
        num_heads=6,
        num_kv_heads=3,
        head_dim=32,
        intermediate_size=320,
        aux_layers=(0, 3, 6),
        fc_norm=True,
        norm_output=True,
    ),
    "two layers, one norm before fc, a pruned vocabulary": lambda base: replace(
        base, num_layers=2, norm_before_fc=True, draft_vocab_size=900
    ),
    "no captured layers": lambda base: replace(base, use_aux=False, num_aux=1),
    "one captured layer": lambda base: replace(base, num_aux=1, aux_layers=(5,)),
}


def write_shape(folder: Path, config: DraftConfig) -> Path:
    """A draft's config.json, and beside it a map that leaves out every third of the target's tokens."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    if config.is_pruned:
        save_file({"d2t": torch.arange(config.draft_vocab_size) // 2}, folder / "map.safetensors")
    return folder


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_draft_of_any_shape_drafts_on_the_server_what_ours_says(tmp_path, probe_plugin, transformers_target, shape):
    directory, environment = probe_plugin
    config = shape(fresh_config(read_target(WORLD)))
    model, _ = transformers_target
    server = start_ours(
        tmp_path / "run",
        free_port(),
        draft=f"init:{write_shape(tmp_path / 'shape', config)}",
        sets=["supervisor.sidecar=false"],
        environment=environment,
    )
    server.probe = directory
    capture = Capture(server)
    learn(server)
    draft_config, weights = read_draft(server.paths.version(2))
    draft, embed_VD = Draft(draft_config, weights), read_embedding(WORLD).float()

    flush(server)
    _, walked = capture.send(world_prompts(16, seed=31, domains=("code",)), max_tokens=80)
    flush(server)
    probed, records = probe(server, capture, num_prompts=8)
    hello, status = server.control.request(GetHello()), server.control.request(GetStatus())
    capture.close()
    stopped = server.stop()

    num_correct = count_walked(draft, walked, embed_VD)
    num_compared, largest = compare_with_probe(draft, probed, records, embed_VD)
    print(
        f"{num_correct} accepted in {len(walked)} walks, {num_compared} drafted tokens equal, logits to {largest:.1e}"
    )
    assert draft_config == config
    assert (hello.num_aux, status.version, status.fuse, len(walked)) == (config.num_aux, 2, "closed", 16)
    assert num_correct > 20
    assert num_compared > 150
    assert largest < 1e-4
    for sample in walked[:4]:
        with torch.inference_mode():
            states = model(sample.tokens_T[None], output_hidden_states=True).hidden_states
        # transformers norms the last of its hidden states; the one before layer i is hidden_states[i].
        layers = aux_layers(config, model.config.num_hidden_layers) or [-1]
        expected = torch.cat([states[layer][0] for layer in layers], dim=-1)[sample.has_aux_T]
        torch.testing.assert_close(sample.aux_TA[sample.has_aux_T], expected, atol=2e-4, rtol=1e-4)
    assert stopped == 0
