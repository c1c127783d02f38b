"""The accept walk against a naive server that drafts with its own tokens."""

import math
from dataclasses import replace

import pytest
import torch

from onlinespec.draft.rows import build_rows
from onlinespec.draft.walk import accept_length, accept_walk, matches, matches_each, walk
from tests.draft.tiny import LoopDraft, build_draft, build_embedding, build_sample

NUM_STEPS = 3


@torch.no_grad()
def agreeable_sample(draft, embed, seed: int, num_answer: int = 24):
    """A request whose answer often is what the draft would say."""
    sample = build_sample(seed, 5, num_answer, config=draft.config)
    generator = torch.Generator().manual_seed(seed)
    tokens = sample.tokens_T.clone()
    position = sample.num_prompt_tokens - 1
    while position + 2 < sample.num_tokens:
        for step in range(min(NUM_STEPS, sample.num_tokens - 2 - position)):
            if float(torch.rand(1, generator=generator)) > 0.75:
                break
            sample = replace(sample, tokens_T=tokens)
            rows = build_rows([sample], [torch.tensor([position])], embed, NUM_STEPS)
            best = draft.unroll(rows)[step, 0].argmax()
            tokens[position + 2 + step] = best if draft.target_ids_W is None else draft.target_ids_W[best]
        position += step + 1
    return sample


def serve(loop: LoopDraft, sample) -> list[tuple[int, int, int]]:
    """Start, correct and committed tokens of every verify step: the drafted token feeds the next step."""
    steps, start, end = [], sample.num_prompt_tokens, sample.num_tokens - 1
    while start < end:
        cache, logits, hidden = loop.prefix(sample, start)
        drafted = [loop.target_id(logits)]
        for step in range(1, NUM_STEPS):
            logits, hidden = loop.token(drafted[-1], hidden, start - 1 + step, cache)
            drafted.append(loop.target_id(logits))
        num_correct = 0
        for token in drafted:
            place = start + 1 + num_correct
            if place > end or token != int(sample.tokens_T[place]):
                break
            num_correct += 1
        num_committed = min(1 + num_correct, end - start)
        steps.append((start, num_correct, num_committed))
        start += num_committed
    return steps


@pytest.mark.parametrize(("limit", "bound"), [("MAX_ROWS", 7), ("MAX_SCORES", 7 * 4 * 45)])
def test_a_long_answer_is_walked_in_parts_and_says_the_same(monkeypatch, limit: str, bound: int):
    draft, embed = build_draft(), build_embedding()
    sample = agreeable_sample(draft, embed, seed=3, num_answer=40)
    whole = matches(draft, sample, embed, NUM_STEPS)
    sizes, unroll = [], draft.unroll
    monkeypatch.setattr(f"onlinespec.draft.walk.{limit}", bound)
    monkeypatch.setattr(draft, "unroll", lambda rows: (sizes.append(rows.num_queries), unroll(rows))[1])

    found = matches(draft, sample, embed, NUM_STEPS)

    assert torch.equal(found, whole)
    assert whole.any()
    assert max(sizes) == 7
    assert len(sizes) > 5


@pytest.mark.parametrize(
    "changes",
    [{}, {"draft_vocab_size": 17}, {"num_layers": 2, "norm_output": True}, {"use_aux": False, "num_aux": 1}],
    ids=lambda changes: "-".join(changes) or "plain",
)
@torch.no_grad()
def test_walk_counts_what_a_server_drafting_with_its_own_tokens_counts(changes):
    draft, embed = build_draft(3, **changes), build_embedding(3)
    lengths = set()
    for seed in range(4):
        sample = agreeable_sample(draft, embed, seed)

        steps = walk(draft, sample, embed, NUM_STEPS)

        expected = serve(LoopDraft(draft, embed), sample)
        assert list(zip(steps.start, steps.num_correct, steps.num_committed, strict=True)) == expected
        lengths |= set(steps.num_correct)
    assert lengths == {0, 1, 2, 3}


def test_walk_goes_from_step_to_step_and_stops_at_the_last_token():
    yes, no = True, False
    matches_RK = torch.tensor(
        [[yes, no, yes], [no] * 3, [yes] * 3, [no] * 3, [yes] * 3, [no] * 3, [yes, no, no], [no] * 3]
    )

    steps = accept_walk(matches_RK, start=10, end=17, num_steps=3)

    assert steps.start == [10, 12, 16]
    assert steps.num_correct == [1, 3, 1]
    assert steps.num_committed == [2, 4, 1]
    assert accept_length(steps) == pytest.approx(7 / 3)


def test_walk_with_fewer_steps_uses_the_first_columns_only():
    matches_RK = torch.ones(7, 3, dtype=torch.bool)

    assert accept_walk(matches_RK, 0, 6, num_steps=1).num_committed == [2, 2, 2]
    assert accept_walk(matches_RK, 0, 6, num_steps=3).num_committed == [4, 2]


def test_a_request_of_one_token_has_no_step():
    steps = accept_walk(torch.ones(1, 3, dtype=torch.bool), start=5, end=5, num_steps=3)

    assert len(steps) == 0
    assert math.isnan(accept_length(steps))


def test_rows_that_were_not_captured_match_nothing():
    draft, embed = build_draft(3), build_embedding(3)
    sample = agreeable_sample(draft, embed, 0)
    full = matches(draft, sample, embed, NUM_STEPS)
    place = sample.num_prompt_tokens - 1 + int(full[:, 0].nonzero()[-1])
    has_aux_T = sample.has_aux_T.clone()
    has_aux_T[place] = False

    partial = matches(draft, replace(sample, has_aux_T=has_aux_T), embed, NUM_STEPS)

    row = place + 1 - sample.num_prompt_tokens
    assert full[row].any()
    assert not partial[row].any()
    assert torch.equal(full[:row], partial[:row])


def test_several_drafts_on_one_sample_match_as_each_does_alone():
    embed = build_embedding(3)
    drafts = [build_draft(seed) for seed in (3, 4)]
    sample = agreeable_sample(drafts[0], embed, 1)

    together = matches_each(drafts, sample, embed, NUM_STEPS)

    assert torch.equal(together[0], matches(drafts[0], sample, embed, NUM_STEPS))
    assert torch.equal(together[1], matches(drafts[1], sample, embed, NUM_STEPS))
    assert not torch.equal(together[0], together[1])
