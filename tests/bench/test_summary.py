"""Counters of answers as one row, against numbers made by hand."""

import io
import random
from dataclasses import replace

import pytest
from rich.console import Console

from onlinespec.bench.client import Answer, Prompt
from onlinespec.bench.summary import conversations, percentile, position_acceptance, summarise, table

PROMPT = Prompt.of_text("chat", "Hello")


def answer(steps: int, correct: int, tokens: int, chunks: list[float], sent_s: float = 10.0, **other) -> Answer:
    return Answer(
        PROMPT,
        sent_s,
        chunk_s=chunks,
        finish_reason="stop",
        num_output_tokens=tokens,
        num_verify_steps=steps,
        num_correct_drafts=correct,
        has_counters=True,
        **other,
    )


LONG = answer(10, 30, 38, [10.5, 11.0, 12.0], histogram=[1, 1, 1, 7])
SHORT = answer(2, 0, 3, [11.1, 11.3], sent_s=11.0, histogram=[2])
FAILED = Answer(PROMPT, 9.0, error="APIConnectionError: refused", num_output_tokens=99, num_verify_steps=99)


def test_accept_length_weighs_every_verify_step_the_same():
    row = summarise("chat", [LONG, SHORT])

    assert row.accept_length == (12 + 30) / 12
    assert row.accept_length != (40 / 10 + 2 / 2) / 2, "a mean over requests is another number"
    assert (row.num_verify_steps, row.num_correct_drafts, row.num_output_tokens) == (12, 30, 41)


def test_the_truncated_figure_counts_visible_tokens_after_the_first():
    row = summarise("chat", [LONG, SHORT])

    assert row.accept_length_truncated == ((38 - 1) + (3 - 1)) / 12


def test_an_answer_without_verify_steps_does_not_count_in_the_truncated_figure():
    one_token = answer(0, 0, 1, [10.2])

    row = summarise("chat", [LONG, one_token])

    assert row.accept_length_truncated == 37 / 10
    assert row.num_output_tokens == 39


def test_the_turns_of_one_conversation_vary_together():
    easy = [Prompt("chat", (), number=1), Prompt("chat", (), number=1, turn=1)]
    turns = [replace(LONG, prompt=easy[0]), replace(LONG, prompt=easy[1]), replace(SHORT, prompt=PROMPT)]

    together, apart = summarise("chat", turns), summarise("chat", [LONG, LONG, SHORT])

    assert together.accept_length == apart.accept_length
    assert together.accept_length_high - together.accept_length_low > apart.accept_length_high - apart.accept_length_low
    assert [(c.num_verify_steps, c.num_correct_drafts) for c in conversations(turns).values()] == [(20, 60), (2, 0)]
    assert conversations(turns)[1].histogram == [2, 2, 2, 14]


def test_answers_that_were_not_streamed_have_a_speed_and_no_latencies():
    whole = answer(10, 30, 38, [], done_s=14.0)

    row = summarise("chat", [whole])

    assert row.tokens_per_s == 38 / 4.0
    assert (row.ttft_p50_s, row.gap_p50_s, row.token_p50_s) == (None, None, None)


def test_inter_token_latency_shares_a_gap_among_its_tokens():
    row = summarise("chat", [answer(2, 3, 6, [10.5, 11.1, 11.2], chunk_tokens=[1, 4, 5])])

    assert row.token_p50_s == pytest.approx(0.2)
    assert row.gap_p99_s == pytest.approx(0.6)


def test_failed_answers_are_counted_and_otherwise_left_out():
    row = summarise("chat", [LONG, FAILED])
    alone = summarise("chat", [LONG])

    assert (row.num_requests, row.num_failed) == (2, 1)
    assert row.accept_length == alone.accept_length
    assert (row.num_output_tokens, row.tokens_per_s) == (38, 38 / 2.0)


def test_latencies_are_those_of_first_chunks_and_of_the_gaps_between_chunks():
    row = summarise("chat", [LONG, SHORT])

    assert (row.ttft_p50_s, row.ttft_p99_s) == pytest.approx((0.1, 0.5))
    assert (row.gap_p50_s, row.gap_p99_s) == pytest.approx((0.5, 1.0))
    assert row.tokens_per_s == 41 / (12.0 - 10.0)


@pytest.mark.parametrize("answers", [[], [FAILED]])
def test_of_nothing_there_is_no_figure(answers: list[Answer]):
    row = summarise("chat", answers)

    assert (row.accept_length, row.accept_length_truncated, row.tokens_per_s) == (None, None, None)
    assert (row.ttft_p50_s, row.gap_p99_s, row.position_acceptance) == (None, None, [])


def test_position_acceptance_is_the_share_of_steps_that_got_so_far():
    # 4 + 3 steps of up to 3 drafted tokens: 2 accepted none, 1 one, 1 two, 3 all three.
    found = position_acceptance([[1, 1, 1, 1], [1, 0, 0, 2]])

    assert [share.value for share in found] == [5 / 7, 4 / 7, 3 / 7]
    assert all(share.low < share.value < share.high for share in found)


def test_position_acceptance_agrees_with_counting_step_by_step():
    rng = random.Random(1)
    accepted = [rng.randrange(5) for _ in range(200)]
    parts = accepted[:60], accepted[60:]
    histograms = [[part.count(j) for j in range(max(part) + 1)] for part in parts]

    found = [share.value for share in position_acceptance(histograms)]

    assert found == [sum(count >= position for count in accepted) / 200 for position in (1, 2, 3, 4)]
    assert 1 + sum(found) == pytest.approx(1 + sum(accepted) / 200), "their sum is the accept length"


def test_answers_with_shorter_histograms_accepted_nothing_further_on():
    assert [share.value for share in position_acceptance([[3], [1, 0, 2]])] == [2 / 6, 2 / 6]
    assert position_acceptance([[], [0, 0]]) == []


@pytest.mark.parametrize(
    ("values", "percent", "wanted"),
    [([3.0, 1.0, 2.0], 50, 2.0), ([1.0, 2.0], 50, 1.0), ([5.0], 99, 5.0), ([1.0, 2.0], 0, 1.0), ([], 50, None)],
)
def test_a_percentile_is_the_smallest_value_that_so_many_are_not_above(values: list, percent: float, wanted):
    assert percentile(values, percent) == wanted


def test_the_99th_of_a_hundred_is_the_last_but_one():
    assert percentile([float(n) for n in range(1, 101)], 99) == 99.0
    assert percentile([float(n) for n in range(1, 102)], 99) == 100.0


def test_the_table_shows_a_row_per_summary_and_a_dash_where_there_is_no_number():
    rows = [summarise("chat", [LONG, SHORT]), summarise("none", [FAILED])]
    console = Console(width=160, file=io.StringIO())

    console.print(table(rows, "title"))

    lines = console.file.getvalue().splitlines()
    chat = next(line for line in lines if "chat" in line)
    none = next(line for line in lines if "none" in line)
    assert "3.50 (1.00-" in chat, "the interval stands beside it"
    assert "100/500" in chat
    assert "-/-" in none
