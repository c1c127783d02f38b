"""The fused loss against a loop over rows, and the teacher at a temperature against the whole vocabulary."""

import math

import pytest
import torch

from onlinespec.draft import losses
from onlinespec.draft.losses import Targets, build_targets, head_loss

NUM_ROWS, DIM, VOCABULARY, TOP_K = 11, 6, 13, 4


def build_teacher(scale: float = 2.0):
    logits_NV = scale * torch.randn(NUM_ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    top = logits_NV.topk(TOP_K)
    return logits_NV, top.indices, top.values, logits_NV.logsumexp(-1)


def loop_loss(states, head, targets: Targets, weight) -> torch.Tensor:
    total = states.new_zeros(())
    for n in range(len(states)):
        if not bool(targets.is_valid_N[n]):
            continue
        probs = (head @ states[n]).softmax(0)
        rest, kl = probs.sum() * 0, states.new_zeros(())
        for w in range(len(head)):
            if w not in targets.ids_Nk[n].tolist():
                rest = rest + probs[w]
        for w, q in zip(targets.ids_Nk[n].tolist(), targets.probs_Nk[n].tolist(), strict=True):
            if q > 0:
                kl = kl + q * (math.log(q) - probs[w].log())
        tail = float(targets.tail_N[n])
        if tail > 0:
            kl = kl + tail * (math.log(tail) - rest.log())
        total = total + weight[n] * kl
    return total


@pytest.mark.parametrize("chunk_rows", [4, 1024])
@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_head_loss_and_its_gradients_equal_a_loop_over_rows(monkeypatch, temperature, is_pruned, chunk_rows):
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk_rows)
    _, ids, values, lse = build_teacher()
    draft_ids = None
    num_draft = VOCABULARY
    if is_pruned:
        draft_ids = torch.full((VOCABULARY,), -1)
        draft_ids[[0, 2, 3, 5, 8, 9, 12]] = torch.arange(7)
        num_draft = 7
    targets = build_targets(ids, values, lse, torch.full((NUM_ROWS,), temperature), draft_ids)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(NUM_ROWS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(num_draft, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64)
    targets = Targets(targets.ids_Nk, targets.probs_Nk.double(), targets.tail_N.double(), targets.is_valid_N)

    loss = head_loss(states, head, targets, weight)
    found = torch.autograd.grad(3 * loss, [states, head])

    expected_loss = loop_loss(states, head, targets, weight)
    expected = torch.autograd.grad(3 * expected_loss, [states, head])
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
    assert (int(targets.is_valid_N.sum()) < NUM_ROWS) == (is_pruned and temperature == 0.0)


def test_a_greedy_row_puts_all_mass_on_the_argmax():
    logits_NV, ids, values, lse = build_teacher()

    targets = build_targets(ids, values, lse, torch.zeros(NUM_ROWS), None)

    assert torch.equal(targets.ids_Nk[:, 0], logits_NV.argmax(-1))
    assert targets.probs_Nk.tolist() == [[1.0, 0.0, 0.0, 0.0]] * NUM_ROWS
    assert targets.tail_N.tolist() == [0.0] * NUM_ROWS


def test_at_temperature_one_the_teacher_is_exact():
    logits_NV, ids, values, lse = build_teacher()

    targets = build_targets(ids, values, lse, torch.ones(NUM_ROWS), None)

    exact = logits_NV.softmax(-1).gather(1, ids)
    torch.testing.assert_close(targets.probs_Nk, exact)
    torch.testing.assert_close(targets.tail_N, 1 - exact.sum(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("temperature", "sign"), [(0.5, 1.0), (0.8, 1.0), (1.5, -1.0)])
def test_the_tail_is_bounded_from_the_known_side_at_other_temperatures(temperature, sign):
    logits_NV, ids, values, lse = build_teacher()

    targets = build_targets(ids, values, lse, torch.full((NUM_ROWS,), temperature), None)

    exact = 1 - (logits_NV / temperature).softmax(-1).gather(1, ids).sum(-1)
    assert bool((sign * (targets.tail_N - exact) >= -1e-5).all())
    torch.testing.assert_close(targets.probs_Nk.sum(-1) + targets.tail_N, torch.ones(NUM_ROWS))
    assert float((targets.tail_N - exact).abs().max()) < 0.2


def test_a_row_mixes_greedy_and_sampled_requests():
    _, ids, values, lse = build_teacher()
    temperature = torch.tensor([0.0, 1.0] * NUM_ROWS)[:NUM_ROWS]

    targets = build_targets(ids, values, lse, temperature, None)

    assert torch.equal(targets.tail_N > 0, temperature > 0)


def test_what_is_left_of_a_pruned_teacher_is_renormalised():
    draft_ids = torch.full((VOCABULARY,), -1)
    draft_ids[:5] = torch.arange(5)
    ids = torch.tensor([[0, 7, 3], [9, 1, 8]])
    probs = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])

    targets = build_targets(ids, probs.log(), torch.zeros(2), torch.ones(2), draft_ids)

    assert targets.ids_Nk.tolist() == [[0, 5, 3], [5, 1, 5]]
    expected = torch.tensor([[0.5, 0.0, 0.125], [0.0, 0.25, 0.0]]) / torch.tensor([[0.75], [0.375]])
    torch.testing.assert_close(targets.probs_Nk, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(targets.tail_N, torch.tensor([0.125 / 0.75, 0.125 / 0.375]), atol=1e-6, rtol=1e-5)
    assert targets.is_valid_N.tolist() == [True, True]


def test_a_confident_draft_has_finite_loss_and_gradients():
    head = torch.eye(DIM).mul(300).requires_grad_()
    states = torch.eye(DIM).requires_grad_()
    ids = torch.arange(DIM)[:, None].roll(1, 0)
    targets = Targets(ids, torch.full((DIM, 1), 0.5), torch.full((DIM,), 0.5), torch.ones(DIM, dtype=torch.bool))

    loss = head_loss(states, head, targets, torch.ones(DIM))
    loss.backward()

    assert math.isfinite(float(loss.detach()))
    assert float(loss.detach()) > 10
    assert bool(torch.isfinite(head.grad).all())
    assert float(states.grad.abs().max()) > 1
