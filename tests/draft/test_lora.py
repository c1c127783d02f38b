"""Adapters: a draft begins unchanged, and what is published is plain weights."""

import torch

from onlinespec.draft.lora import Adapter, add_adapters
from onlinespec.draft.rows import build_rows, draft_positions
from tests.draft.tiny import build_draft, build_embedding, build_sample


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

    names = ["fc.weight", "midlayer.self_attn.q_proj.weight"]
    add_adapters(draft, names, rank=2, alpha=4.0, generator=torch.Generator().manual_seed(0))
    after = draft.unroll(rows)
    after.square().sum().backward()

    torch.testing.assert_close(after.detach(), before)
    trained = {name: p for name, p in draft.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    assert all(("lora_b" in name) == bool(p.grad.abs().sum() > 0) for name, p in trained.items())
