"""Orders, the draft in service over a stream, and what a course of it comes to."""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console

from onlinespec.bench.arms import parse_arm
from onlinespec.bench.replay import DomainResult, Look, Recovery, ReplayRow, World, play, result_of
from onlinespec.bench.replay_gate import ReplayGate, Shape
from onlinespec.bench.replay_jobs import ReplayPlan, build_player, rows_at_once
from onlinespec.bench.replay_orders import ORDERS, schedule, tokens_per_s
from onlinespec.bench.replay_report import num_gained, recovery_to, summarise_rows, table
from onlinespec.bench.replay_run import run_replay
from onlinespec.bench.replay_world import NUM_HELD_OUT, choose_held_out, domain_and_path
from onlinespec.draft.fresh import build_fresh_draft, read_embedding
from onlinespec.draft.sample import Sample
from onlinespec.errors import BenchError
from onlinespec.resolve import load_config
from tests.draft.tiny import write_target
from tests.offline.small import build_samples, write_recording

TINY = ("trainer.unroll_steps=2", "buffer.recent_samples=6", "buffer.reservoir_samples=8")


def pools(count: int = 40) -> dict[str, list[Sample]]:
    samples = build_samples(2 * count)
    return {"a": samples[:count], "b": samples[count:]}


def marked(sample: Sample) -> Sample:
    """With an answer like no other: what training has seen does not judge."""
    tokens_T = sample.tokens_T.clone()
    tokens_T[-2:] = torch.tensor([sample.request % 29, sample.request // 29])
    return replace(sample, tokens_T=tokens_T, started_s=sample.ended_s - 0.1)


def domains_of(order: str, **changes) -> list[str]:
    given = {"tokens_per_domain": 200, "tokens_per_s": 10.0, "seed": 0} | changes
    return [domain for domain, _ in schedule(order, pools(), **given)]


def runs(domains: list[str]) -> list[str]:
    return [domain for i, domain in enumerate(domains) if not i or domains[i - 1] != domain]


@pytest.fixture
def world(tmp_path: Path) -> World:
    write_target(tmp_path / "target")
    config, weights = build_fresh_draft(tmp_path / "target", 0)
    held_out = {domain: samples[:4] for domain, samples in pools(8).items()}
    shape = Shape(config, read_embedding(tmp_path / "target").float(), num_draft_steps=2)
    return World(shape, weights, True, held_out, {"a": 3.0, "b": 3.0})


def test_an_abrupt_stream_changes_once_at_half_of_its_tokens():
    stream = schedule("abrupt", pools(), 200, 10.0, seed=0)

    domains = [domain for domain, _ in stream]
    before = sum(sample.num_answer_tokens for domain, sample in stream if domain == "a")
    assert runs(domains) == ["a", "b"]
    assert 200 <= before < 200 + 13


def test_a_recurring_stream_comes_back():
    assert runs(domains_of("recurring")) == ["a", "b", "a", "b"]


def test_a_gradual_stream_begins_with_one_domain_and_ends_with_the_other():
    domains = domains_of("gradual")

    tenth = len(domains) // 5
    assert domains[:tenth].count("a") > 0.7 * tenth
    assert domains[-tenth:].count("b") > 0.7 * tenth
    assert len(runs(domains)) > 4


def test_in_bursts_each_domain_is_a_tenant_of_its_own():
    stream = schedule("bursts", pools(), 150, 10.0, seed=2)

    assert {(domain, sample.tenant) for domain, sample in stream} == {("a", "a"), ("b", "b")}


@pytest.mark.parametrize("order", ORDERS)
def test_a_stream_is_the_seed_s_and_uses_no_request_twice(order: str):
    first, again, other = (schedule(order, pools(), 150, 10.0, seed=seed) for seed in (0, 0, 1))

    keys = [(domain, sample.request) for domain, sample in first]
    assert keys == [(domain, sample.request) for domain, sample in again]
    assert keys != [(domain, sample.request) for domain, sample in other]
    assert len(set(keys)) == len(keys)


def test_requests_end_one_after_another_at_the_rate_of_the_recordings():
    stream = schedule("abrupt", pools(), 50, 10.0, seed=0)

    tokens = 0
    for _, sample in stream:
        tokens += sample.num_answer_tokens
        assert sample.ended_s == pytest.approx(tokens / 10.0)


def test_the_rate_of_a_recording_is_its_answer_tokens_over_its_span():
    samples = [replace(sample, started_s=5.0, ended_s=5.0 + i) for i, sample in enumerate(build_samples(3))]

    assert tokens_per_s(samples) == sum(sample.num_answer_tokens for sample in samples) / 2.0


def test_recordings_that_are_too_short_say_what_they_hold():
    with pytest.raises(BenchError, match=r"recordings of b hold 10\d answer tokens .* lower --tokens"):
        schedule("abrupt", {"a": build_samples(200), "b": build_samples(10)}, 1000, 10.0, seed=0)


def test_held_out_requests_are_the_same_whatever_order_they_come_in_and_differ_in_their_answers():
    samples = build_samples(120)

    found, turned = choose_held_out("a", samples), choose_held_out("a", samples[::-1])

    assert [s.answer_key for s in found] == [s.answer_key for s in turned]
    assert len({s.answer_key for s in found}) == NUM_HELD_OUT


@pytest.mark.parametrize(("text", "domain"), [("/x/code-101", "code"), ("chat=/x/code-101", "chat"), ("/x/a-b", "a-b")])
def test_a_recording_s_domain_is_its_folder_s_name_or_the_one_given(text: str, domain: str):
    assert domain_and_path(text)[0] == domain


def test_without_speculation_the_accept_length_is_one_and_nothing_is_trained(world: World):
    row = play(parse_arm("none"), "abrupt", 0, schedule("abrupt", pools(), 60, 10.0, 0), load_config([], []), world)

    assert [look.accept_length for look in row.looks] == [{"a": 1.0, "b": 1.0}]
    assert (row.num_swaps, row.optimizer_steps) == (0, 0)


def test_the_recipe_swaps_every_fifty_steps_whatever_comes_of_it(world: World):
    arm = parse_arm("recipe trainer.batch_requests=1")
    config = load_config([], [*TINY, *arm.overrides, "trainer.unroll_steps=2"])
    stream = schedule("abrupt", pools(60), 600, 10.0, 0)

    row = play(arm, "abrupt", 0, stream, config, world)

    assert row.optimizer_steps == len(stream)
    assert row.num_swaps == len(stream) // 50
    assert [look.num_requests for look in row.looks] == [0, *range(50, len(stream) + 1, 50)]


def race_config():
    """Candidates every 4 steps, few requests to a verdict."""
    lenient = ("holdout_frac=0.5", "candidate_steps=4", "min_requests=4", "min_span_s=0", "slice_min_frac=0.9")
    return load_config([], [*TINY, *(f"gate.{setting}" for setting in lenient), "gate.futility_requests=8"])


@pytest.mark.parametrize("is_better", [True, False])
def test_onlinespec_serves_what_won_its_race_and_nothing_else(world: World, monkeypatch, is_better: bool):
    def walks(drafts, sample, embed_VD, num_steps):
        shape = (sample.num_answer_tokens, num_steps)
        return [torch.full(shape, not is_better), torch.full(shape, is_better)]

    monkeypatch.setattr("onlinespec.bench.replay_gate.matches_each", walks)
    distinct = {domain: [marked(sample) for sample in samples] for domain, samples in pools().items()}

    row = play(parse_arm("onlinespec"), "abrupt", 0, schedule("abrupt", distinct, 350, 10.0, 0), race_config(), world)

    decisions = [verdict.decision for verdict in row.verdicts]
    assert set(decisions) == {"promote" if is_better else "drop"}
    assert row.num_swaps == decisions.count("promote")
    assert row.num_candidates - len(decisions) in (0, 1)


def test_a_conversation_that_trains_judges_first_where_it_may(world: World, monkeypatch):
    judged = []

    def observe(gate: ReplayGate, sample: Sample, cluster: int | None, clusters: list[int]) -> bool:
        judged.append(sample.request)
        return False

    monkeypatch.setattr(ReplayGate, "observe", observe)
    stream = schedule("abrupt", pools(), 100, 10.0, 0)
    none_held_out = "gate.holdout_frac=0.000001"

    rows = [
        play(parse_arm("onlinespec"), "abrupt", 0, stream, load_config([], [*TINY, none_held_out, judge_new]), world)
        for judge_new in ("gate.judge_new=true", "gate.judge_new=false")
    ]

    firsts: dict[bytes, int] = {}
    for _, sample in stream:
        firsts.setdefault(sample.group, sample.request)
    assert judged == list(firsts.values())
    assert [row.num_held_out for row in rows] == [0, 0]
    assert rows[0].optimizer_steps == rows[1].optimizer_steps > 0


def test_what_is_held_out_to_judge_is_not_trained_on(world: World):
    stream = schedule("abrupt", pools(), 100, 10.0, 0)
    held_out = load_config([], [*TINY, "gate.holdout_frac=0.999999"])

    row = play(parse_arm("onlinespec"), "abrupt", 0, stream, held_out, world)

    assert (row.num_held_out, row.optimizer_steps) == (len(stream), 0)


def course() -> tuple[list[Look], list[tuple[str, Sample]]]:
    """Eight requests of ten answer tokens, half a and half b; b at 1, 2, 1.8 and 2.8 from requests 0, 5, 6, 7 on."""
    sample = build_samples(1)[0]
    sample = replace(sample, num_prompt_tokens=sample.num_tokens - 10)
    stream = [("a" if i < 4 else "b", sample) for i in range(8)]
    looks = [Look(i, 10 * i, {"a": 2.0, "b": b}) for i, b in ((0, 1.0), (5, 2.0), (6, 1.8), (7, 2.8))]
    return looks, stream


def test_recovery_is_counted_from_the_domain_s_first_request_to_the_first_draft_that_is_good_enough():
    found = result_of("b", 3.0, *course())

    # 0.7 * 3 = 2.1, 0.8 * 3 = 2.4, 0.9 * 3 = 2.7: all reached by the look at request 7, 3 after the first of b.
    assert found.recoveries == tuple(Recovery(level, True, 3, 30) for level in (0.7, 0.8, 0.9))


def test_what_was_never_reached_is_bounded_by_all_that_came():
    found = result_of("b", 3.2, *course())

    assert found.recoveries[-1] == Recovery(0.9, False, 4, 40)


def test_regret_is_the_sum_over_tokens_of_what_the_draft_in_service_lacked():
    found = result_of("b", 2.5, *course())

    assert found.regret_area == pytest.approx((10 * (1.5 + 0.5 + 0.7) + 0) / 1000)
    assert (found.num_tokens, found.final) == (40, 2.8)


def test_what_is_forgotten_is_the_best_there_was_less_what_is_left():
    looks = [Look(0, 0, {"a": 2.5}), Look(1, 10, {"a": 3.0}), Look(2, 20, {"a": 2.2})]

    assert result_of("a", 3.0, looks, course()[1]).forgotten == pytest.approx(0.8)


def row(arm: str, seed: int, tokens: int, is_reached: bool = True) -> ReplayRow:
    recoveries = tuple(Recovery(level, is_reached, tokens // 10, tokens) for level in (0.7, 0.8, 0.9))
    domains = {name: DomainResult(3.0, 2.5, 0.1, 1.5, 1000, recoveries) for name in ("a", "b")}
    looks = [Look(0, 0, {"a": 1.0, "b": 1.0})]
    begins = [("a", 0, 0), ("b", 10, 100)]
    return ReplayRow(arm, "abrupt", seed, domains, looks, begins, 20, 200, 0, 0, 0, [], 0, 0.0)


def test_a_swap_gained_where_the_domain_that_was_served_has_more_accepted_after_it():
    lengths = ((0, 1.0, 1.0), (5, 2.0, 1.0), (10, 1.5, 2.0), (11, 2.0, 2.0), (15, 1.0, 3.0))
    looks = [Look(i, 10 * i, {"a": a, "b": b}) for i, a, b in lengths]

    # At request 10 the last of a's ended: a lost. At 11 b's first: no change.
    assert num_gained(msgspec.structs.replace(row("onlinespec", 0, 100), looks=looks)) == 2


def test_the_ratio_to_the_recipe_is_paired_by_seed():
    rows = [row("recipe", 0, 1000), row("recipe", 1, 4000), row("onlinespec", 1, 1000), row("onlinespec", 0, 250)]

    ours = summarise_rows(rows)[1]

    recovery = ours.recoveries[-1]
    assert recovery.tokens_over_recipe is not None
    assert recovery.tokens_over_recipe.mean == pytest.approx(0.25)
    assert recovery.tokens_over_recipe.low == pytest.approx(0.25)
    assert (recovery.num_reached, recovery.is_at_most, ours.num_seeds) == (2, False, 2)
    assert ours.regret_area.mean == 3.0


def test_recovery_to_what_the_recipe_ends_with_is_read_off_the_drafts_that_served():
    lengths = ((0, 1.0), (12, 1.5), (14, 2.25), (16, 2.5))
    looks = [Look(i, 10 * i, {"a": 3.0, "b": b}) for i, b in lengths]
    recipe = msgspec.structs.replace(row("recipe", 0, 100), looks=[*looks[:1], Look(20, 200, {"a": 1.0, "b": 2.5})])
    ours = msgspec.structs.replace(row("onlinespec", 0, 100), looks=looks)

    line = summarise_rows([recipe, ours])[1].to_recipe

    # The recipe ends at 2.5: 0.9 of it 4 requests and 40 tokens after the shift, the recipe itself after 10 and 100.
    assert line is not None
    assert (line.tokens.mean, line.requests.mean) == (40, 4)
    assert line.tokens_over_recipe is not None
    assert line.tokens_over_recipe.mean == pytest.approx(0.4)
    assert summarise_rows([ours])[0].to_recipe is None
    assert not recovery_to(ours, 2.6).is_reached


def test_a_recipe_that_never_gets_there_makes_the_ratio_a_bound_and_an_arm_that_does_not_has_none():
    rows = [
        row("recipe", 0, 1000, is_reached=False),
        row("onlinespec", 0, 250),
        row("frozen", 0, 900, is_reached=False),
    ]

    recipe, ours, frozen = summarise_rows(rows)

    assert ours.recoveries[-1].is_at_most
    assert frozen.recoveries[-1].tokens_over_recipe is None
    assert recipe.recoveries[-1].num_reached == 0
    assert table([recipe, ours, frozen]).row_count == 3


def test_a_replay_from_recordings_to_result_and_plot_which_goes_on_where_it_ended(tmp_path: Path):
    write_target(tmp_path / "target")
    samples = build_samples(400)
    for name, part in (("a-1", samples[:200]), ("b-1", samples[200:])):
        write_recording(tmp_path / name, tmp_path / "target", part)
    plan = ReplayPlan(
        recordings=(str(tmp_path / "a-1"), str(tmp_path / "b-1")),
        target=tmp_path / "target",
        out=tmp_path / "r.json",
        draft="first",
        arms=("none", "frozen"),
        orders=("abrupt",),
        seeds=(0,),
        tokens_per_domain=100,
        oracle_passes=1,
        overrides=TINY,
    )

    assert run_replay(plan, Console(quiet=True))
    assert run_replay(replace(plan, arms=("frozen", "recipe"), seeds=(0, 1), jobs=2), Console(quiet=True))

    result = json.loads(plan.out.read_text())["rows"]
    assert [(r["arm"], r["seed"]) for r in result] == [
        ("none", 0),
        ("frozen", 0),
        ("recipe", 0),
        ("frozen", 1),
        ("recipe", 1),
    ]
    frozen = result[1]
    assert frozen["looks"][0]["accept_length"]["a"] == frozen["domains"]["a"]["oracle"]
    assert plan.out.with_suffix(".png").stat().st_size > 0
    assert (tmp_path / "r.oracles" / "a" / "model.safetensors").is_file()
    alone = build_player(plan, lambda share: None).row(("abrupt", 1, parse_arm("recipe")))
    beside = msgspec.convert({name: result[4][name] for name in alone.__struct_fields__}, ReplayRow)
    assert msgspec.structs.replace(beside, training_cpu_s=alone.training_cpu_s) == alone


def test_a_worker_that_ends_early_is_told_of(tmp_path: Path):
    plan = ReplayPlan((), tmp_path, tmp_path / "r.json", "init", ("frozen",), ("abrupt",), (0,), 100, jobs=2)

    with pytest.raises(BenchError, match=r"one of 2 worker processes died.*smaller --jobs goes on"):
        list(rows_at_once(plan, [("abrupt", 0, parse_arm("frozen"))], lambda played: None))


def test_a_replay_has_no_arm_whose_depth_follows_the_load(tmp_path: Path):
    plan = ReplayPlan((), tmp_path, tmp_path / "r.json", "init", ("adaptive",), ("abrupt",), (0,), 100)

    with pytest.raises(BenchError, match="adaptive: its draft depth follows"):
        run_replay(plan, Console(quiet=True))


def test_an_unknown_order_is_refused_by_name(tmp_path: Path):
    plan = ReplayPlan((), tmp_path, tmp_path / "r.json", "init", ("frozen",), ("random",), (0,), 100)

    with pytest.raises(BenchError, match="'random': no such order; wanted one of abrupt"):
        run_replay(plan, Console(quiet=True))
