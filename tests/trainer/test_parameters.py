"""What is trained and what a candidate is made of: KV modes, adapters, resuming under another config."""

import io

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from onlinespec.config import TrainerConfig
from onlinespec.draft.header import canonical_names
from onlinespec.draft.model import Draft
from onlinespec.draft.rows import build_rows, draft_positions
from onlinespec.draft.trainable import frozen_names
from onlinespec.errors import ConfigError
from onlinespec.trainer.step import Trainer
from tests.draft.tiny import CONFIG, build_draft, build_embedding, build_sample

BASE = TrainerConfig(unroll_steps=2, muon_lr=0.02, adamw_lr=5e-3, warmup_steps=1, dtype="float32")
LORA = {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": ("q_proj", "k_proj", "down_proj")}


def build_trainer(is_fresh: bool = True, seed: int = 0, **changes) -> Trainer:
    draft = build_draft(seed)
    return Trainer(msgspec.structs.replace(BASE, **changes), draft.config, draft.weights(), build_embedding(), is_fresh)


def run(trainer: Trainer, num_steps: int, first: int = 0) -> list[float]:
    return [trainer.step([build_sample(first + step, 4, 6)]).loss for step in range(num_steps)]


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("mode", ["free", "projections", "stable"])
def test_a_kv_mode_keeps_what_it_freezes_and_trains_the_rest(mode):
    trainer = build_trainer(kv_mode=mode)
    before = trainer.weights()

    run(trainer, 3)

    assert moved(before, trainer.weights()) == set(before) - frozen_names(canonical_names(CONFIG), mode)


def test_a_fresh_draft_trains_everything_first_and_then_no_candidate_moves_the_keys():
    trainer = build_trainer(kv_mode="stable", kv_free_steps=3)
    frozen = frozen_names(canonical_names(CONFIG), "stable")
    before = trainer.weights()

    run(trainer, 3)
    third = trainer.weights()
    run(trainer, 3, first=3)

    assert moved(before, third) == set(before)
    assert moved(third, trainer.weights()) == set(before) - frozen
    state = trainer.draft.state_dict()
    assert all(torch.equal(state[name], third[name]) for name in frozen), "trains on what candidates do not have"


def test_a_warm_draft_has_no_free_steps():
    trainer = build_trainer(is_fresh=False, kv_mode="stable", kv_free_steps=3)
    before = trainer.weights()

    run(trainer, 2)

    assert "fc.weight" not in moved(before, trainer.weights())


@pytest.mark.parametrize("is_fresh", [True, False])
def test_auto_freezes_the_projections_of_a_draft_that_came_trained_and_nothing_of_an_untrained_one(is_fresh, tmp_path):
    trainer, resumed = build_trainer(is_fresh=is_fresh), build_trainer(is_fresh=False)
    before = trainer.weights()

    run(trainer, 2)
    torch.save(trainer.state(), tmp_path / "state.pt")
    resumed.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    at_restart = resumed.weights()
    run(resumed, 2)

    for first, last in ((before, trainer.weights()), (at_restart, resumed.weights())):
        assert ("midlayer.self_attn.k_proj.weight" in moved(first, last)) == is_fresh
        assert "fc.weight" in moved(first, last)


def test_a_resumed_draft_that_was_fresh_keeps_its_free_steps_and_one_that_was_warm_has_none():
    changes = {"kv_mode": "stable", "kv_free_steps": 4}
    fresh, warm = build_trainer(**changes), build_trainer(is_fresh=False, **changes)
    run(fresh, 2)
    run(warm, 2)
    was_fresh, was_warm = build_trainer(is_fresh=False, **changes), build_trainer(**changes)

    was_fresh.load_state(fresh.state())
    was_warm.load_state(warm.state())
    before = [was_fresh.weights(), was_warm.weights()]
    run(was_fresh, 1)
    run(was_warm, 1)

    assert "fc.weight" in moved(before[0], was_fresh.weights())
    assert "fc.weight" not in moved(before[1], was_warm.weights())


def test_a_restart_on_a_frozen_draft_keeps_the_keys_of_the_other_weights():
    trainer, other = build_trainer(kv_mode="stable"), build_draft(seed=9).weights()
    run(trainer, 2)

    trainer.restart(other)
    run(trainer, 2)

    assert "fc.weight" not in moved(other, trainer.weights())
    assert "lm_head.weight" in moved(other, trainer.weights())


def test_adapters_train_their_matrices_alone_and_are_merged_into_plain_names():
    trainer = build_trainer(kv_mode="free", **LORA)
    before = trainer.weights()
    assert moved(before, build_draft().weights()) == set()

    run(trainer, 3)

    after = trainer.weights()
    assert moved(before, after) == {
        "midlayer.self_attn.q_proj.weight",
        "midlayer.self_attn.k_proj.weight",
        "midlayer.mlp.down_proj.weight",
    }
    assert all(torch.linalg.matrix_rank(after[n] - before[n], atol=1e-6) <= 2 for n in moved(before, after))


def test_the_merged_draft_says_what_the_adapted_one_says():
    trainer = build_trainer(ema_decay=0.0, **LORA)
    sample, embed = build_sample(7, 5, 6), build_embedding()
    rows = build_rows([sample], [draft_positions(sample)], embed, 2)

    run(trainer, 3)

    plain = Draft(CONFIG, trainer.weights())
    torch.testing.assert_close(plain.unroll(rows), trainer.draft.unroll(rows), atol=1e-5, rtol=1e-5)


def test_adapters_respect_the_kv_mode():
    trainer = build_trainer(kv_mode="stable", **LORA)
    before = trainer.weights()

    run(trainer, 3)

    assert moved(before, trainer.weights()) == {"midlayer.self_attn.q_proj.weight", "midlayer.mlp.down_proj.weight"}


def test_a_rank_that_does_not_fit_is_a_config_error():
    with pytest.raises(ConfigError, match=r"trainer\.lora_rank is 17, wanted at most"):
        build_trainer(lora_rank=17)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine", "schedule_steps": 9},
        {"kv_mode": "stable", "kv_free_steps": 2},
        {"kv_mode": "stable", "kv_free_steps": 4},
        {"step_weights": "reach", "accept_frac": 0.5, "accept_ramp_steps": 4},
        LORA,
    ],
    ids=["adamw-cosine", "frozen", "freezes-later", "reach-accept", "lora"],
)
def test_a_resumed_run_gives_the_losses_and_the_weights_of_an_unbroken_one(changes):
    unbroken, first, resumed = build_trainer(**changes), build_trainer(**changes), build_trainer(seed=9, **changes)
    run(unbroken, 3)
    run(first, 3)

    resumed.load_state(through_a_file(first.state()))
    found = [run(trainer, 4, first=3) for trainer in (unbroken, resumed)]

    assert found[0] == found[1]
    assert moved(unbroken.weights(), resumed.weights()) == set()


@pytest.mark.parametrize(
    "changes", [{"lora_rank": 3}, {"lora_alpha": 16.0}, {"lora_rank": 0}], ids=["rank", "alpha", "none"]
)
def test_adapters_of_another_rank_or_scale_go_on_from_the_merged_weights(changes):
    first, second = build_trainer(ema_decay=0.0, **LORA), build_trainer(seed=9, **{**LORA, **changes})
    run(first, 3)
    merged = first.weights()

    second.load_state(first.state())

    for name, tensor in second.weights().items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=1e-5)


def test_a_restart_on_an_untrained_draft_has_its_free_steps_again():
    trainer, other = build_trainer(kv_mode="stable", kv_free_steps=3), build_draft(seed=9).weights()
    run(trainer, 4)

    trainer.restart(other, is_fresh=True)
    run(trainer, 3)
    third = trainer.weights()
    run(trainer, 2)

    assert "fc.weight" in moved(other, third)
    assert "fc.weight" not in moved(third, trainer.weights())


@pytest.mark.parametrize("changes", [LORA, {"optimizer": "adamw"}, {"unroll_steps": 3}])
def test_a_state_of_another_kind_of_training_gives_its_weights_and_a_fresh_optimizer(changes):
    first, second = build_trainer(), build_trainer(seed=9, **changes)
    run(first, 3)

    second.load_state(first.state())

    assert moved(second.weights(), {n: t.detach() for n, t in first.draft.state_dict().items()}) == set()
    assert second.num_steps == 3
    run(second, 1)
    assert second.num_steps == 4


def test_a_state_with_adapters_is_taken_over_merged_by_a_trainer_without():
    first, second = build_trainer(ema_decay=0.0, **LORA), build_trainer(seed=9)
    run(first, 3)

    second.load_state(first.state())

    for name, tensor in second.weights().items():
        torch.testing.assert_close(tensor, first.weights()[name], atol=1e-6, rtol=1e-5)


def test_frozen_by_a_changed_config_the_candidates_keys_stand_still_from_the_resume_on():
    first, second = build_trainer(), build_trainer(kv_mode="stable", kv_free_steps=0)
    run(first, 3)

    second.load_state(first.state())
    before = second.weights()
    run(second, 2, first=3)

    frozen = frozen_names(canonical_names(CONFIG), "stable")
    assert moved(before, second.weights()) == set(before) - frozen


def test_bfloat16_training_keeps_float32_masters_that_hold_updates_too_small_for_it():
    trainer = build_trainer(dtype="bfloat16", optimizer="adamw", adamw_lr=1e-6, ema_decay=0.0)
    before = trainer.weights()

    losses = run(trainer, 2)

    after = trainer.weights()
    assert losses == pytest.approx(run(build_trainer(), 2), rel=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    is_same_in_bfloat16 = before["fc.weight"].bfloat16() == after["fc.weight"].bfloat16()
    assert float((before["fc.weight"] != after["fc.weight"]).float().mean()) > 0.9
    assert float(is_same_in_bfloat16.float().mean()) > 0.9


@pytest.mark.parametrize(("has_it", "expected"), [(False, torch.float32), (True, torch.bfloat16)])
def test_auto_multiplies_forward_backward_and_muon_in_what_the_cpu_is_fast_in(monkeypatch, has_it, expected):
    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
                dtypes.update(x.dtype for x in args if isinstance(x, torch.Tensor))
            return operation(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_it})
    trainer, dtypes = build_trainer(dtype="auto"), set()
    with Products():
        run(trainer, 1)

    assert dtypes == {expected}


# The compiler warns of its own doings, and takes half a minute.
COMPILED = pytest.param({"compile": True}, marks=[pytest.mark.full, pytest.mark.filterwarnings("ignore")], id="compile")


@pytest.mark.parametrize("changes", [pytest.param({"checkpoint_activations": True}, id="recompute"), COMPILED])
def test_how_a_step_is_computed_changes_none_of_its_numbers(changes):
    plain, other = build_trainer(), build_trainer(**changes)
    samples = [[build_sample(3 * step + i, 4, 5 + i) for i in range(1 + step)] for step in range(3)]

    found = [[trainer.step(batch) for batch in samples] for trainer in (plain, other)]

    for expected, result in zip(*found, strict=True):
        assert result.loss == pytest.approx(expected.loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)


def test_recomputing_keeps_less_for_the_backward_pass():
    sample, embed = build_sample(1, 6, 40), build_embedding()
    rows = build_rows([sample], [draft_positions(sample)], embed, 6)
    kept = []
    for is_recomputing in (False, True):
        draft, sizes = build_draft(), []
        draft.is_recomputing = is_recomputing
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            draft.states(rows)
        kept.append(sum(sizes))

    assert kept[1] < kept[0] / 3


def test_a_draft_step_without_rows_keeps_its_measured_reach():
    trainer = build_trainer(step_weights="reach", unroll_steps=3)

    for _ in range(5):
        trainer.step([build_sample(1, 4, 3)])

    assert trainer.state()["reach"][2] == pytest.approx(0.64)


def test_the_measured_reach_is_the_share_of_chains_whose_drafts_matched_so_far():
    trainer = build_trainer(step_weights="reach", unroll_steps=3, ema_decay=0.0)
    samples = [build_sample(1, 4, 9), build_sample(2, 3, 5)]
    embed, steps = build_embedding(), [1.0, 0.8, 0.64]
    reached, present = [0, 0, 0], [0, 0, 0]
    for sample in samples:
        positions = draft_positions(sample)
        drafted = trainer.draft.unroll(build_rows([sample], [positions], embed, 3)).argmax(-1)
        for n, position in enumerate(positions.tolist()):
            is_reached = True
            for k in range(3):
                teacher = position + 1 + k
                if teacher >= sample.num_tokens - 1:
                    break
                present[k] += 1
                reached[k] += is_reached
                is_reached = is_reached and int(drafted[k, n]) == int(sample.tokens_T[teacher + 1])

    trainer.step(samples)

    expected = [0.95 * old + 0.05 * r / p for old, r, p in zip(steps, reached, present, strict=True)]
    assert trainer.state()["reach"].tolist() == pytest.approx(expected)
