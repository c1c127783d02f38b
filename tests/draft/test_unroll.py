"""The packed unroll against the draft run token by token with a growing cache."""

from dataclasses import replace

import pytest
import torch

from onlinespec.draft.header import canonical_names
from onlinespec.draft.rows import build_rows, draft_positions
from tests.draft.tiny import LoopDraft, build_draft, build_embedding, build_sample

NUM_STEPS = 4


def loop_logits(loop: LoopDraft, sample, position: int) -> torch.Tensor:
    """Teacher-forced logits of every step from one row. Shapes: [K, W]."""
    cache, logits, hidden = loop.prefix(sample, position + 1)
    out = [logits]
    for step in range(1, NUM_STEPS):
        token = int(sample.tokens_T[min(position + 1 + step, sample.num_tokens - 1)])
        logits, hidden = loop.token(token, hidden, position + step, cache)
        out.append(logits)
    return torch.stack(out)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_output": True},
        {"fc_norm": True},
        {"norm_before_fc": True},
        {"num_kv_heads": 4},
        {"draft_vocab_size": 11},
        {"num_layers": 2},
        {"num_layers": 3, "num_heads": 6, "num_kv_heads": 3, "head_dim": 4, "intermediate_size": 40},
        {"num_layers": 2, "norm_output": True, "fc_norm": True},
        {"num_aux": 1},
        {"use_aux": False, "num_aux": 1, "num_layers": 2},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
@torch.no_grad()
def test_unroll_equals_drafting_token_by_token(changes):
    draft, embed = build_draft(**changes), build_embedding()
    sizes = [(1, 6, 9), (2, 3, 5), (3, 11, 4)]
    samples = [build_sample(*size, config=draft.config) for size in sizes]
    wanted = [draft_positions(sample) for sample in samples]

    logits_KNW = draft.unroll(build_rows(samples, wanted, embed, NUM_STEPS))

    loop = LoopDraft(draft, embed)
    expected = [loop_logits(loop, s, int(p)) for s, positions in zip(samples, wanted, strict=True) for p in positions]
    torch.testing.assert_close(logits_KNW, torch.stack(expected, dim=1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("num_layers", [1, 2])
@torch.no_grad()
def test_rows_that_were_not_captured_are_absent_and_the_others_keep_their_positions(num_layers):
    draft, embed = build_draft(num_layers=num_layers), build_embedding()
    sample = build_sample(4, 8, 8)
    has_aux_T = sample.has_aux_T.clone()
    has_aux_T[[0, 1, 2, 5, 10]] = False
    sample = replace(sample, has_aux_T=has_aux_T, aux_TA=torch.where(has_aux_T[:, None], sample.aux_TA, torch.nan))
    wanted = draft_positions(sample)

    logits_KNW = draft.unroll(build_rows([sample], [wanted], embed, NUM_STEPS))

    assert wanted.tolist() == [7, 8, 9, 11, 12, 13, 14]
    loop = LoopDraft(draft, embed)
    expected = torch.stack([loop_logits(loop, sample, int(p)) for p in wanted], dim=1)
    torch.testing.assert_close(logits_KNW, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_a_sample_gives_the_same_logits_alone_and_in_a_batch():
    draft, embed = build_draft(), build_embedding()
    samples = [build_sample(seed, 5, 7) for seed in range(3)]
    wanted = [draft_positions(sample) for sample in samples]

    together = draft.unroll(build_rows(samples, wanted, embed, NUM_STEPS))
    alone = [draft.unroll(build_rows([s], [w], embed, NUM_STEPS)) for s, w in zip(samples, wanted, strict=True)]

    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_layers", "expected"), [(1, ["KN"]), (2, ["C+(K-1)N", "KN"])])
@torch.no_grad()
def test_only_layers_below_the_last_are_run_on_context_rows(num_layers, expected):
    draft, embed = build_draft(num_layers=num_layers), build_embedding()
    samples = [build_sample(1, 20, 5), build_sample(2, 3, 8)]
    rows = build_rows(samples, [draft_positions(sample) for sample in samples], embed, NUM_STEPS)
    counted: dict[str, int] = {}
    for name, module in draft.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(
                lambda _module, args, _out, name=name: counted.update({name: counted.get(name, 0) + len(args[0])})
            )

    draft.states(rows)

    num_context, num_queries = len(rows.position_C), rows.num_queries
    sizes = {"KN": NUM_STEPS * num_queries, "C+(K-1)N": num_context + (NUM_STEPS - 1) * num_queries}
    assert list(counted.values()) == [sizes[name] for name in expected]
    assert num_context > num_queries


def test_every_parameter_of_every_layer_learns():
    draft, embed = build_draft(num_layers=3, fc_norm=True, norm_output=True), build_embedding()
    sample = build_sample(1, 6, 9)

    draft.unroll(build_rows([sample], [draft_positions(sample)], embed, 2)).square().sum().backward()

    assert {name for name, weight in draft.named_parameters() if not weight.grad.any()} == set()


def test_llama3_frequencies_keep_the_short_waves_and_stretch_the_long_ones():
    plain = build_draft(head_dim=32).inverse_frequency

    scaled = build_draft(head_dim=32, rope_llama3=(8.0, 1.0, 4.0, 64)).inverse_frequency

    for frequency, found in zip(plain.tolist(), scaled.tolist(), strict=True):
        wave = 2 * torch.pi / frequency
        blend = (64 / wave - 1.0) / 3.0
        expected = (1 - blend) * frequency / 8 + blend * frequency
        expected = frequency if wave < 16 else frequency / 8 if wave > 64 else expected
        assert found == pytest.approx(expected, rel=1e-5)
    assert bool((scaled == plain).any())
    assert bool((scaled == plain / 8).any())


@pytest.mark.parametrize(
    "changes",
    [
        {"fc_norm": True, "norm_before_fc": True, "draft_vocab_size": 11},
        {"num_layers": 3, "intermediate_size": 40},
        {"use_aux": False, "num_aux": 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_state_names_are_the_names_of_the_checkpoint(changes):
    draft = build_draft(**changes)

    found = {name: tuple(tensor.shape) for name, tensor in draft.weights().items()}

    assert found == canonical_names(draft.config)
