"""Optimizer steps: what has a loss, what is skipped, what a restart resumes, and that the draft learns."""

import io
import math
from dataclasses import replace

import msgspec
import pytest
import torch

from onlinespec.config import TrainerConfig
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample
from onlinespec.draft.walk import accept_length, walk
from onlinespec.trainer.batch import build_batch
from onlinespec.trainer.step import Trainer
from tests.draft.tiny import CONFIG, LoopDraft, build_draft, build_embedding, build_sample

CONFIG_3 = TrainerConfig(unroll_steps=3, loss_decay=0.5, muon_lr=0.02, adamw_lr=5e-3, warmup_steps=2, dtype="float32")


def replace_config(**changes) -> TrainerConfig:
    return msgspec.structs.replace(CONFIG_3, **changes)


def build_trainer(config: TrainerConfig = CONFIG_3, **changes) -> Trainer:
    draft = build_draft(**changes)
    return Trainer(config, draft.config, draft.weights(), build_embedding())


def loop_loss(trainer: Trainer, samples: list[Sample], num_steps: int, decay: float) -> float:
    """Greedy teachers: mean over rows of -log p(argmax), step by step, token by token."""
    loop, sums, counts = LoopDraft(trainer.draft, build_embedding()), [0.0] * num_steps, [0] * num_steps
    for sample in samples:
        for position in range(sample.num_prompt_tokens - 1, sample.num_tokens - 1):
            if not bool(sample.has_aux_T[position]):
                continue
            cache, logits, hidden = loop.prefix(sample, position + 1)
            for step in range(num_steps):
                place = position + 1 + step
                if place >= sample.num_tokens:
                    break
                if step:
                    logits, hidden = loop.token(int(sample.tokens_T[place]), hidden, position + step, cache)
                if bool(sample.has_teacher_T[place]):
                    sums[step] -= float(logits.log_softmax(0)[sample.teacher_ids_Tk[place, 0]])
                    counts[step] += 1
    weights = [decay**step for step in range(num_steps)]
    return sum(w * s / c for w, s, c in zip(weights, sums, counts, strict=True)) / sum(weights)


@torch.no_grad()
def test_the_loss_is_the_decayed_mean_over_rows_of_each_step():
    samples = [build_sample(1, 5, 6), build_sample(2, 3, 9), build_sample(3, 4, 2)]
    has_aux_T, has_teacher_T = samples[1].has_aux_T.clone(), samples[1].has_teacher_T.clone()
    has_aux_T[[1, 6]], has_teacher_T[[5, 8]] = False, False
    samples[1] = replace(samples[1], has_aux_T=has_aux_T, has_teacher_T=has_teacher_T)
    # A stop inside an accepted run leaves the last token a row and a teacher.
    everywhere = torch.ones(6, dtype=torch.bool)
    samples[2] = replace(samples[2], has_aux_T=everywhere, has_teacher_T=everywhere)
    trainer = build_trainer()
    expected = loop_loss(trainer, samples, 3, 0.5)

    with torch.enable_grad():
        result = trainer.step(samples)

    assert result.loss == pytest.approx(expected, rel=1e-4)
    assert result.is_applied
    assert result.num_rows == 5 + 5 + 2


def test_rows_without_a_loss_at_any_step_are_not_computed():
    sample = build_sample(0, 5, 8)
    has_teacher_T = torch.arange(13) == 8

    batch = build_batch([replace(sample, has_teacher_T=has_teacher_T)], build_embedding(), 3, None)

    assert batch.rows.position_C[batch.rows.query_N].tolist() == [5, 6, 7]
    assert batch.rows.sizes == ((8, 3),)
    assert sorted(batch.chains.step_M.tolist()) == [0, 1, 2]


def test_accumulated_batches_make_the_step_of_one_batch():
    samples = [build_sample(seed, 4, 3 + seed, temperature=0.7 * (seed % 2)) for seed in range(5)]
    whole, parts = build_trainer(), build_trainer(TrainerConfig(**{**as_dict(CONFIG_3), "accumulation": 3}))

    results = [[trainer.step(samples) for _ in range(2)] for trainer in (whole, parts)]

    assert results[0][1].loss == pytest.approx(results[1][1].loss, rel=1e-4)
    assert results[0][0].grad_norm == pytest.approx(results[1][0].grad_norm, rel=1e-4)
    assert results[0][0].num_rows == results[1][0].num_rows


def as_dict(config: TrainerConfig) -> dict:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    good = [build_sample(seed) for seed in range(2)]
    bad = replace(good[0], aux_TA=good[0].aux_TA * math.inf)
    hurt, clean = build_trainer(), build_trainer()

    result = hurt.step([bad, good[1]])
    after = [trainer.step(good) for trainer in (hurt, clean)]

    assert not result.is_applied
    assert not math.isfinite(result.loss + result.grad_norm)
    assert (hurt.num_skipped, hurt.num_steps) == (1, 1)
    assert after[0] == after[1]
    assert all(torch.equal(tensor, clean.weights()[name]) for name, tensor in hurt.weights().items())


def test_samples_with_nothing_to_learn_make_no_step():
    trainer = build_trainer()
    sample = build_sample(0)
    blind = replace(sample, has_aux_T=torch.zeros_like(sample.has_aux_T))

    results = [trainer.step([]), trainer.step([blind]), trainer.step([build_sample(0, 5, 1)])]

    assert all(not result.is_applied and result.num_rows == 0 for result in results)
    assert (trainer.num_steps, trainer.num_skipped) == (0, 0)


def test_a_resumed_trainer_goes_on_exactly_as_an_unbroken_one():
    batches = [[build_sample(2 * seed, 4, 6, 0.7), build_sample(2 * seed + 1)] for seed in range(6)]
    unbroken, first, resumed = build_trainer(), build_trainer(), build_trainer(seed=9)
    for batch in batches[:3]:
        unbroken.step(batch)
        first.step(batch)
        first.generator.manual_seed(11)
    file = io.BytesIO()
    torch.save(first.state(), file)
    first.step(batches[0])
    file.seek(0)

    resumed.load_state(torch.load(file, weights_only=True))
    results = [[trainer.step(batch) for batch in batches[3:]] for trainer in (unbroken, resumed)]

    assert results[0] == results[1]
    assert resumed.num_steps == 6
    assert all(torch.equal(tensor, unbroken.weights()[name]) for name, tensor in resumed.weights().items())
    assert torch.equal(resumed.generator.get_state(), torch.Generator().manual_seed(11).get_state())


def test_candidates_are_the_moving_average_of_the_weights_after_each_step():
    trainer = build_trainer(replace_config(ema_decay=0.5))
    expected = trainer.draft.weights()

    for step in range(1, 14):
        trainer.step([build_sample(step, 5, 6)])
        decay = min(0.5, step / (step + 10))
        for name, tensor in trainer.draft.weights().items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor

    for name, tensor in trainer.weights().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)


def test_a_restart_takes_other_weights_warms_up_again_and_goes_on_counting():
    trainer, other = build_trainer(), build_draft(seed=9).weights()
    samples = [build_sample(1, 5, 6)]
    for _ in range(3):
        trainer.step(samples)

    trainer.restart(other)

    fresh = Trainer(CONFIG_3, trainer.draft.config, other, build_embedding(), is_fresh=False)
    assert trainer.num_steps == 3
    assert trainer.step(samples) == fresh.step(samples)
    assert trainer.num_steps == 4
    assert all(torch.equal(tensor, fresh.weights()[name]) for name, tensor in trainer.weights().items())


def test_state_and_weights_are_copies():
    trainer = build_trainer()
    trainer.step([build_sample(0)])
    state, weights = trainer.state(), trainer.weights()
    momentum = {name: tensor.clone() for name, tensor in state["optimizer"]["momentum"].items()}
    moment = state["optimizer"]["adamw"]["state"][0]["exp_avg"].clone()
    head, live_head = weights["lm_head.weight"].clone(), trainer.draft.lm_head.weight.detach().clone()

    trainer.step([build_sample(1)])

    assert torch.equal(weights["lm_head.weight"], head)
    assert torch.equal(state["parameters"]["averaged"]["lm_head.weight"], head)
    assert torch.equal(state["parameters"]["current"]["lm_head.weight"], live_head)
    assert torch.equal(state["optimizer"]["adamw"]["state"][0]["exp_avg"], moment)
    assert all(torch.equal(tensor, momentum[name]) for name, tensor in state["optimizer"]["momentum"].items())
    assert not torch.equal(trainer.weights()["lm_head.weight"], head)


def test_the_vocabulary_map_and_the_embedding_are_never_trained():
    trainer = build_trainer(draft_vocab_size=17)
    before, embed = trainer.weights(), build_embedding()

    for seed in range(3):
        trainer.step([build_sample(seed, temperature=0.7)])

    assert torch.equal(trainer.weights()["d2t"], before["d2t"])
    assert torch.equal(trainer.weights()["t2d"], before["t2d"])
    assert torch.equal(trainer._embed_VD, embed)
    assert not torch.equal(trainer.weights()["fc.weight"], before["fc.weight"])


def learnable_sample(seed: int, temperature: float) -> Sample:
    """Every token is followed by the one a fixed permutation names; hidden states tell nothing."""
    permutation = torch.randperm(CONFIG.vocab_size, generator=torch.Generator().manual_seed(99))
    sample = build_sample(seed, 4, 16, temperature)
    tokens = sample.tokens_T.clone()
    for place in range(1, sample.num_tokens):
        tokens[place] = permutation[tokens[place - 1]]
    ids = (permutation[tokens][:, None] + torch.arange(4)) % CONFIG.vocab_size
    logits = torch.tensor([6.0, 1.0, 0.0, -1.0]).expand(sample.num_tokens, 4)
    return replace(
        sample, tokens_T=tokens, teacher_ids_Tk=ids, teacher_logits_Tk=logits, teacher_lse_T=logits.logsumexp(1) + 0.01
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_accept_length_rises_on_requests_that_were_not_trained_on(temperature):
    torch.manual_seed(0)
    config = TrainerConfig(unroll_steps=3, muon_lr=0.05, adamw_lr=1e-2, dtype="float32")
    embed = build_embedding()
    trainer = Trainer(config, CONFIG, Draft(CONFIG).weights(), embed)
    held_out = [learnable_sample(seed, temperature) for seed in range(1000, 1004)]

    def mean_length() -> float:
        return sum(accept_length(walk(trainer.draft, sample, embed, 3)) for sample in held_out) / len(held_out)

    before = mean_length()
    results = [trainer.step([learnable_sample(4 * step + i, temperature) for i in range(4)]) for step in range(90)]

    assert before < 1.5
    assert mean_length() > 3.0
    assert results[-1].loss < 0.3 * results[0].loss
