"""Adapters: a draft begins unchanged, and what is published is plain weights."""

import pytest
import torch

from onlinespec.draft.header import canonical_names
from onlinespec.draft.lora import Adapter, adapted_names, add_adapters, check_rank
from onlinespec.draft.rows import build_rows, draft_positions
from onlinespec.errors import ConfigError
from tests.draft.tiny import CONFIG, build_draft, build_embedding, build_sample

SHAPES = canonical_names(CONFIG)


def test_an_adapter_adds_its_scaled_low_rank_product():
    adapter = Adapter((5, 7), rank=2, alpha=6.0, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 7)
    assert torch.equal(adapter(weight), weight)

    with torch.no_grad():
        adapter.lora_b.normal_()

    expected = weight.clone()
    for o in range(5):
        for i in range(7):
            expected[o, i] += 3.0 * sum(adapter.lora_b[o, r] * adapter.lora_a[r, i] for r in range(2)).detach()
    torch.testing.assert_close(adapter(weight).detach(), expected)


def test_adapters_leave_the_draft_as_it_is_and_take_its_gradients():
    draft, embed = build_draft(), build_embedding()
    sample = build_sample(1, 6, 9)
    rows = build_rows([sample], [draft_positions(sample)], embed, 3)
    before = draft.unroll(rows).detach()
    names = adapted_names(SHAPES, ["q_proj", "fc"], frozenset())

    add_adapters(draft, names, rank=2, alpha=4.0, generator=torch.Generator().manual_seed(0))
    after = draft.unroll(rows)
    after.square().sum().backward()

    assert names == ["fc.weight", "midlayer.self_attn.q_proj.weight"]
    torch.testing.assert_close(after.detach(), before)
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all(("lora_b" in name) == bool(p.grad.abs().sum() > 0) for name, p in trained.items())


def test_frozen_matrices_get_no_adapter():
    frozen = frozenset({"midlayer.self_attn.k_proj.weight"})

    names = adapted_names(SHAPES, ["k_proj", "o_proj"], frozen)

    assert names == ["midlayer.self_attn.o_proj.weight"]


@pytest.mark.parametrize(
    ("targets", "frozen", "message"),
    [
        (["w_proj"], frozenset(), r"lora_targets names w_proj, wanted one of down_proj, fc"),
        (["fc"], frozenset({"fc.weight"}), r"lora_targets is fc, all of which trainer\.kv_mode freezes"),
    ],
)
def test_targets_that_leave_nothing_are_config_errors(targets, frozen, message):
    with pytest.raises(ConfigError, match=message):
        adapted_names(SHAPES, targets, frozen)


def test_a_rank_above_the_shape_is_a_config_error():
    check_rank(SHAPES, ["fc.weight"], rank=16)

    with pytest.raises(ConfigError, match=r"trainer\.lora_rank is 17, wanted at most 16 for fc\.weight \[16, 48\]"):
        check_rank(SHAPES, ["fc.weight"], rank=17)
