"""What a KV mode freezes is what makes the server's draft KV."""

import pytest
import torch

from onlinespec.draft.freeze import frozen_names
from onlinespec.draft.header import canonical_names
from onlinespec.draft.rows import build_rows
from onlinespec.errors import ConfigError
from tests.draft.tiny import LoopDraft, build_draft, build_embedding, build_sample

CHANGES = {"fc_norm": True, "norm_before_fc": True}


def cached(draft) -> list[torch.Tensor]:
    """Keys and values of every captured row, as a server writes them."""
    sample = build_sample(1, 6, 9)
    cache, _, _ = LoopDraft(draft, build_embedding()).prefix(sample, sample.num_tokens - 1)
    return [torch.stack([*keys, *values]) for keys, values in cache]


@pytest.mark.parametrize("mode", ["free", "projections", "stable"])
def test_stable_freezes_all_that_makes_keys_and_values_and_nothing_else(mode):
    draft, other = build_draft(**CHANGES), build_draft(seed=5, **CHANGES)
    names = canonical_names(draft.config)
    frozen = frozen_names(names, mode)
    before = cached(draft)

    draft.load_weights(draft.weights() | {n: t for n, t in other.weights().items() if n not in frozen})
    is_same = all(torch.equal(a, b) for a, b in zip(cached(draft), before, strict=True))

    assert is_same == (mode == "stable")


def test_each_frozen_name_matters_to_keys_and_values():
    draft, other = build_draft(**CHANGES), build_draft(seed=5, **CHANGES)
    before, weights = cached(draft), draft.weights()

    for name in frozen_names(canonical_names(draft.config), "stable"):
        draft.load_weights(weights | {name: other.weights()[name]})
        assert not all(torch.equal(a, b) for a, b in zip(cached(draft), before, strict=True)), name


def test_several_layers_cannot_be_stable_but_can_freeze_their_projections():
    names = ["fc.weight", "midlayer.self_attn.k_proj.weight", "layers.1.self_attn.v_proj.weight", "norm.weight"]

    with pytest.raises(ConfigError, match=r"trainer\.kv_mode is stable.*set projections or free"):
        frozen_names(names, "stable")

    assert frozen_names(names, "projections") == {names[1], names[2]}


def test_the_unroll_of_a_stable_change_reads_the_same_context():
    draft = build_draft()
    sample = build_sample(2, 4, 6)
    rows = build_rows([sample], [torch.tensor([3, 4])], build_embedding(), 2)
    before = draft.unroll(rows)

    with torch.no_grad():
        draft.lm_head.weight.mul_(2.0)

    torch.testing.assert_close(draft.unroll(rows), 2 * before)
