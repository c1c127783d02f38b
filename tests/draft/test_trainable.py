"""What a KV mode freezes is what makes the server's draft KV; what of the rest gets an adapter."""

import pytest
import torch

from onlinespec.draft.header import canonical_names
from onlinespec.draft.trainable import adapted_names, check_rank, frozen_names
from onlinespec.errors import ConfigError
from tests.draft.tiny import CONFIG, LoopDraft, build_draft, build_embedding, build_sample

SHAPES = canonical_names(CONFIG)
CHANGES = {"fc_norm": True, "norm_before_fc": True}


def cached(draft) -> list[torch.Tensor]:
    """Keys and values of every captured row, as a server writes them."""
    sample = build_sample(1, 6, 9)
    cache, _, _ = LoopDraft(draft, build_embedding()).prefix(sample, sample.num_tokens - 1)
    return [torch.stack([*keys, *values]) for keys, values in cache[0]]


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


def test_frozen_matrices_get_no_adapter():
    frozen = frozenset({"midlayer.self_attn.k_proj.weight"})

    names = adapted_names(SHAPES, ["k_proj", "o_proj"], frozen)

    assert names == ["midlayer.self_attn.o_proj.weight"]


@pytest.mark.parametrize(
    ("targets", "frozen", "message"),
    [
        (["w_proj"], frozenset(), r"lora_targets names w_proj, wanted one of down_proj, fc"),
        (
            ["fc"],
            frozenset({"fc.weight"}),
            r"lora_targets is fc, none of which this draft has and trainer\.kv_mode leaves free",
        ),
    ],
)
def test_targets_that_leave_nothing_are_config_errors(targets, frozen, message):
    with pytest.raises(ConfigError, match=message):
        adapted_names(SHAPES, targets, frozen)


def test_a_rank_above_the_shape_is_a_config_error():
    check_rank(SHAPES, ["fc.weight"], rank=16)

    with pytest.raises(ConfigError, match=r"trainer\.lora_rank is 17, wanted at most 16 for fc\.weight \[16, 48\]"):
        check_rank(SHAPES, ["fc.weight"], rank=17)
