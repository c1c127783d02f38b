"""The fused loss against a loop over rows, and the teacher at a temperature against the whole vocabulary."""

import math
from dataclasses import replace

import pytest
import torch

from onlinespec.draft import losses
from onlinespec.draft.losses import Chains, Terms, head_loss
from onlinespec.draft.targets import Targets, build_targets

NUM_ROWS, DIM, VOCABULARY, TOP_K = 11, 6, 13, 4


def build_teacher(scale: float = 2.0):
    logits_NV = scale * torch.randn(NUM_ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    top = logits_NV.topk(TOP_K)
    return logits_NV, top.indices, top.values, logits_NV.logsumexp(-1)


def in_dtype(targets: Targets, dtype: torch.dtype) -> Targets:
    floats = {name: getattr(targets, name).to(dtype) for name in ("probs_Mk", "tail_M", "kept_M")}
    return replace(targets, **floats)


def loop_loss(states, head, targets: Targets, weight) -> torch.Tensor:
    total = states.new_zeros(())
    for n in range(len(states)):
        if not bool(targets.is_valid_M[n]):
            continue
        probs = (head @ states[n]).softmax(0)
        rest, kl = probs.sum() * 0, states.new_zeros(())
        for w in range(len(head)):
            if w not in targets.ids_Mk[n].tolist():
                rest = rest + probs[w]
        for w, q in zip(targets.ids_Mk[n].tolist(), targets.probs_Mk[n].tolist(), strict=True):
            if q > 0:
                kl = kl + q * (math.log(q) - probs[w].log())
        tail = float(targets.tail_M[n])
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
    targets = in_dtype(targets, torch.float64)

    loss, _ = head_loss(states, head, targets, weight)
    found = torch.autograd.grad(3 * loss, [states, head])

    expected_loss = loop_loss(states, head, targets, weight)
    expected = torch.autograd.grad(3 * expected_loss, [states, head])
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)
    assert (int(targets.is_valid_M.sum()) < NUM_ROWS) == (is_pruned and temperature == 0.0)


def test_a_greedy_row_puts_all_mass_on_the_argmax():
    logits_NV, ids, values, lse = build_teacher()

    targets = build_targets(ids, values, lse, torch.zeros(NUM_ROWS), None)

    assert torch.equal(targets.ids_Mk[:, 0], logits_NV.argmax(-1))
    assert targets.probs_Mk.tolist() == [[1.0, 0.0, 0.0, 0.0]] * NUM_ROWS
    assert targets.tail_M.tolist() == [0.0] * NUM_ROWS


def test_at_temperature_one_the_teacher_is_exact():
    logits_NV, ids, values, lse = build_teacher()

    targets = build_targets(ids, values, lse, torch.ones(NUM_ROWS), None)

    exact = logits_NV.softmax(-1).gather(1, ids)
    torch.testing.assert_close(targets.probs_Mk, exact)
    torch.testing.assert_close(targets.tail_M, 1 - exact.sum(-1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("temperature", "sign"), [(0.5, 1.0), (0.8, 1.0), (1.5, -1.0)])
def test_the_tail_is_bounded_from_the_known_side_at_other_temperatures(temperature, sign):
    logits_NV, ids, values, lse = build_teacher()

    targets = build_targets(ids, values, lse, torch.full((NUM_ROWS,), temperature), None)

    exact = 1 - (logits_NV / temperature).softmax(-1).gather(1, ids).sum(-1)
    assert bool((sign * (targets.tail_M - exact) >= -1e-5).all())
    torch.testing.assert_close(targets.probs_Mk.sum(-1) + targets.tail_M, torch.ones(NUM_ROWS))
    assert float((targets.tail_M - exact).abs().max()) < 0.2


def test_a_row_mixes_greedy_and_sampled_requests():
    _, ids, values, lse = build_teacher()
    temperature = torch.tensor([0.0, 1.0] * NUM_ROWS)[:NUM_ROWS]

    targets = build_targets(ids, values, lse, temperature, None)

    assert torch.equal(targets.tail_M > 0, temperature > 0)


def test_what_is_left_of_a_pruned_teacher_is_renormalised():
    draft_ids = torch.full((VOCABULARY,), -1)
    draft_ids[:5] = torch.arange(5)
    ids = torch.tensor([[0, 7, 3], [9, 1, 8]])
    probs = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])

    targets = build_targets(ids, probs.log(), torch.zeros(2), torch.ones(2), draft_ids)

    assert targets.ids_Mk.tolist() == [[0, 5, 3], [5, 1, 5]]
    expected = torch.tensor([[0.5, 0.0, 0.125], [0.0, 0.25, 0.0]]) / torch.tensor([[0.75], [0.375]])
    torch.testing.assert_close(targets.probs_Mk, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(targets.tail_M, torch.tensor([0.125 / 0.75, 0.125 / 0.375]), atol=1e-6, rtol=1e-5)
    assert targets.is_valid_M.tolist() == [True, True]


def test_a_confident_draft_has_finite_loss_and_gradients():
    head = torch.eye(DIM).mul(300).requires_grad_()
    states = torch.eye(DIM).requires_grad_()
    ids = torch.arange(DIM)[:, None].roll(1, 0)
    targets = Targets(
        ids, torch.full((DIM, 1), 0.5), torch.full((DIM,), 0.5), torch.ones(DIM, dtype=torch.bool), torch.ones(DIM)
    )

    loss, _ = head_loss(states, head, targets, torch.ones(DIM))
    loss.backward()

    assert math.isfinite(float(loss.detach()))
    assert float(loss.detach()) > 10
    assert bool(torch.isfinite(head.grad).all())
    assert float(states.grad.abs().max()) > 1


def build_chains(num_words: int, seed: int = 3) -> Chains:
    """Chains of 3, 2 (its middle step has no row), 1, 3 and 2 rows; some emitted tokens unknown or outside."""
    chain = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4])
    step = torch.tensor([0, 1, 2, 0, 2, 0, 0, 1, 2, 0, 1])
    emitted = torch.randint(num_words, (NUM_ROWS,), generator=torch.Generator().manual_seed(seed))
    emitted[[2, 10]] = num_words
    return Chains(chain, step, emitted, num_steps=3, host_M=chain.numpy())


def build_case(temperature: float, is_pruned: bool):
    _, ids, values, lse = build_teacher()
    num_words = 7 if is_pruned else VOCABULARY
    draft_ids = None
    if is_pruned:
        draft_ids = torch.full((VOCABULARY,), -1)
        draft_ids[[0, 2, 3, 5, 8, 9, 12]] = torch.arange(7)
    targets = build_targets(ids, values, lse, torch.full((NUM_ROWS,), temperature), draft_ids)
    targets = in_dtype(targets, torch.float64)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(NUM_ROWS, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(num_words, DIM, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64)
    return states, head, targets, weight


def loop_reverse(states, head, targets: Targets, weight) -> float:
    total = 0.0
    for n in range(len(states)):
        if not bool(targets.is_valid_M[n]):
            continue
        probs = (head @ states[n]).softmax(0).tolist()
        teacher = dict(zip(targets.ids_Mk[n].tolist(), targets.probs_Mk[n].tolist(), strict=True))
        rest = sum(p for w, p in enumerate(probs) if w not in teacher)
        terms = [(probs[w], q) for w, q in teacher.items() if w < len(probs)] + [(rest, float(targets.tail_M[n]))]
        total += float(weight[n]) * sum(p * math.log(p / max(q, 1e-4)) for p, q in terms)
    return total


def loop_accept(states, head, targets: Targets, chains: Chains) -> float:
    """1 - expected accepted share, chain after chain, step after step."""
    total = 0.0
    for chain in range(int(chains.chain_M[-1]) + 1):
        rows = {int(chains.step_M[n]): n for n in range(len(states)) if int(chains.chain_M[n]) == chain}
        reach, expected = 1.0, 0.0
        for step in range(chains.num_steps):
            if step not in rows:
                break
            probs = (head @ states[rows[step]]).softmax(0).tolist()
            for w, q in zip(targets.ids_Mk[rows[step]].tolist(), targets.probs_Mk[rows[step]].tolist(), strict=True):
                expected += reach * q * float(targets.kept_M[rows[step]]) * (probs[w] if w < len(probs) else 0.0)
            emitted = int(chains.emitted_M[rows[step]])
            reach *= probs[emitted] if emitted < len(probs) else 0.0
        total += 1.0 - expected / chains.num_steps
    return total


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_reverse_kl_equals_a_loop_over_rows(temperature, is_pruned):
    states, head, targets, weight = build_case(temperature, is_pruned)

    loss, _ = head_loss(states, head, targets, weight, Terms(kl=0.0, reverse_kl=1.0))

    assert float(loss.detach()) == pytest.approx(loop_reverse(states, head, targets, weight), rel=1e-6)


@pytest.mark.parametrize("chunk_rows", [4, 1024])
@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_the_accept_term_equals_a_loop_over_chains(monkeypatch, temperature, is_pruned, chunk_rows):
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk_rows)
    states, head, targets, weight = build_case(temperature, is_pruned)
    chains = build_chains(len(head))

    loss, is_match = head_loss(states, head, targets, weight, Terms(kl=0.0, accept=0.25), chains)

    assert float(loss.detach()) == pytest.approx(0.25 * loop_accept(states, head, targets, chains), rel=1e-6)
    assert torch.equal(is_match, (states @ head.T).argmax(-1) == chains.emitted_M)


@pytest.mark.parametrize("chunk_rows", [4, 1024])
@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
@pytest.mark.parametrize(
    "terms",
    [Terms(), Terms(kl=0.0, reverse_kl=1.0), Terms(kl=0.0, accept=0.3), Terms(kl=0.5, reverse_kl=0.2, accept=0.3)],
    ids=["kl", "reverse_kl", "accept", "all"],
)
def test_gradients_of_every_loss_equal_finite_differences(monkeypatch, terms, temperature, is_pruned, chunk_rows):
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk_rows)
    states, head, targets, weight = build_case(temperature, is_pruned)
    chains = build_chains(len(head))

    def loss_of(states, head):
        return head_loss(states, head, targets, weight, terms, chains)[0]

    assert torch.autograd.gradcheck(loss_of, (states, head), eps=1e-6, atol=1e-6, rtol=1e-5)


def test_hard_labels_move_the_mass_to_the_argmax_by_their_share():
    _, ids, values, lse = build_teacher()
    temperature = torch.full((NUM_ROWS,), 0.8)
    soft = build_targets(ids, values, lse, temperature, None)

    half = build_targets(ids, values, lse, temperature, None, hard_frac=0.5)
    hard = build_targets(ids, values, lse, temperature, None, hard_frac=1.0)

    assert hard.probs_Mk.tolist() == [[1.0, 0.0, 0.0, 0.0]] * NUM_ROWS
    torch.testing.assert_close(half.probs_Mk, (soft.probs_Mk + hard.probs_Mk) / 2)
    torch.testing.assert_close(half.tail_M, soft.tail_M / 2)


def test_bfloat16_states_give_float32_gradients_of_the_head():
    states, head, targets, weight = build_case(0.6, False)
    exact, _ = head_loss(states, head, targets, weight)
    expected = torch.autograd.grad(exact, head)[0]
    head32 = head.detach().float().requires_grad_()
    targets = in_dtype(targets, torch.float32)

    loss, _ = head_loss(states.detach().bfloat16(), head32, targets, weight.float())
    (found,) = torch.autograd.grad(loss, head32)

    assert (loss.dtype, found.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.05)


def test_a_frozen_head_costs_no_gradient():
    states, head, targets, weight = build_case(0.6, False)
    expected = torch.autograd.grad(head_loss(states, head, targets, weight)[0], states)[0]

    loss, _ = head_loss(states, head.detach(), targets, weight)

    assert torch.equal(torch.autograd.grad(loss, states, retain_graph=True)[0], expected)
    assert not any(saved.shape == head.shape for saved in loss.grad_fn.saved_tensors)


@pytest.mark.parametrize("num_allowed", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_a_teacher_that_a_grammar_masked_has_the_probabilities_of_the_allowed_tokens(temperature, num_allowed):
    logits_NV = 3 * torch.randn(200, VOCABULARY, generator=torch.Generator().manual_seed(2))
    logits_NV[:, num_allowed:] = -torch.inf
    top = logits_NV.topk(5)
    temperatures = torch.full((200,), temperature)

    targets = build_targets(top.indices, top.values, logits_NV.logsumexp(-1), temperatures, None)

    exact = (logits_NV / temperature).softmax(-1).gather(1, top.indices) if temperature else torch.eye(5)[[0] * 200]
    torch.testing.assert_close(targets.probs_Mk, exact, atol=1e-4, rtol=1e-4)
    assert float(targets.tail_M.abs().max()) < 1e-4


def test_the_mass_a_pruned_vocabulary_keeps_is_told():
    draft_ids = torch.full((VOCABULARY,), -1)
    draft_ids[:5] = torch.arange(5)
    ids = torch.tensor([[0, 7, 3], [9, 1, 8]])
    probs = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.25, 0.125]])

    targets = build_targets(ids, probs.log(), torch.zeros(2), torch.ones(2), draft_ids)

    torch.testing.assert_close(targets.kept_M, torch.tensor([0.75, 0.375]))
