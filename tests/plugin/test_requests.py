"""Segments out of committed passes: which rows are kept, at which positions, with which tokens."""

import gc
from dataclasses import dataclass, field
from typing import Any

import pytest

from onlinespec.plugin.requests import (
    RequestBook,
    effective_temperature,
    is_sampled,
    prefill_pass,
    verify_pass,
)
from onlinespec.wire.messages import Segment


@dataclass
class Reason:
    kind: str

    def to_json(self) -> dict[str, str]:
        return {"type": self.kind}


@dataclass
class Params:
    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.9
    custom_params: Any = None


@dataclass
class Req:
    """What we read of SGLang 0.5.23 managers/schedule_batch.py Req."""

    origin_input_ids: list[int]
    sampling_params: Params = field(default_factory=Params)
    multimodal_inputs: Any = None
    lora_id: str | None = None
    input_embeds: Any = None
    output_ids: list[int] = field(default_factory=list)
    finished_reason: Reason | None = None
    finished_len: int | None = None
    spec_verify_ct: int = 0
    spec_num_correct_drafts: int = 0

    def finished(self) -> bool:
        return self.finished_reason is not None


@dataclass(frozen=True)
class Commit:
    """SGLang 0.5.23 managers/auxiliary_output.py CommittedTokens."""

    output_index: int
    token_ids: tuple[int, ...]


@pytest.fixture
def book() -> RequestBook:
    return RequestBook(is_greedy=False)


def prefilled(book: RequestBook, num_prompt: int = 4, params: Params | None = None) -> Req:
    """A request whose prompt was prefilled in one pass and whose first token, 100, was committed."""
    req = Req(list(range(10, 10 + num_prompt)), params or Params())
    prefill_pass(book, [req], [Commit(0, (100,))], [0], [num_prompt])
    return req


def prefill_segment(request: int, position: int, num_rows: int, tokens: list[int], token_position: int) -> Segment:
    return Segment(request, False, position, num_rows, tokens, token_position, len(tokens), 0, 0, 0, False)


def test_a_prompt_in_one_pass_is_one_segment_with_a_teacher_for_its_last_row(book: RequestBook):
    req = Req([10, 11, 12, 13])

    kept, started = prefill_pass(book, [req], [Commit(0, (100,))], [0], [4])

    assert kept.segments == [prefill_segment(1, 0, 4, [100], 4)]
    assert (kept.rows, kept.teacher_rows) == ([0, 1, 2, 3], [0])
    assert [(s.request, s.prompt_tokens, s.cached_tokens) for s in started] == [(1, [10, 11, 12, 13], 0)]


def test_a_chunk_before_the_last_has_rows_and_no_token_and_the_request_starts_once(book: RequestBook):
    req = Req([10, 11, 12, 13, 14])

    first, started_first = prefill_pass(book, [req], [None], [0], [3])
    last, started_last = prefill_pass(book, [req], [Commit(0, (100,))], [3], [2])

    assert first.segments == [prefill_segment(1, 0, 3, [], 0)]
    assert (first.rows, first.teacher_rows) == ([0, 1, 2], [])
    assert last.segments == [prefill_segment(1, 3, 2, [100], 5)]
    assert (last.rows, last.teacher_rows) == ([0, 1], [0])
    assert (len(started_first), len(started_last)) == (1, 0)


def test_a_prefix_hit_shifts_the_rows_and_is_told_at_the_start(book: RequestBook):
    req = Req([10, 11, 12, 13])

    kept, started = prefill_pass(book, [req], [Commit(0, (100,))], [3], [1])

    assert kept.segments == [prefill_segment(1, 3, 1, [100], 4)]
    assert kept.rows == [0]
    assert started[0].cached_tokens == 3


def test_in_a_batch_rows_of_skipped_requests_are_stepped_over(book: RequestBook):
    refused = Req([1, 2], Params(custom_params={"onlinespec": {"capture": False}}))
    chunk, last = Req([3, 4, 5]), Req([6, 7])

    kept, started = prefill_pass(
        book, [refused, chunk, last], [Commit(0, (100,)), None, Commit(0, (101,))], [0, 0, 0], [2, 3, 2]
    )

    assert [(s.position, s.num_rows, s.tokens) for s in kept.segments] == [(0, 3, []), (0, 2, [101])]
    assert kept.rows == [2, 3, 4, 5, 6]
    assert kept.teacher_rows == [2]
    assert [s.prompt_tokens for s in started] == [[3, 4, 5], [6, 7]]


def test_a_verify_step_keeps_the_rows_of_the_bonus_token_and_of_each_accepted_draft(book: RequestBook):
    req = prefilled(book)

    kept = verify_pass(book, [req], [Commit(1, (101, 102, 103))], [3], 4, [(2, 2)])

    assert kept.segments == [Segment(1, True, 4, 3, [101, 102, 103], 5, 3, 3, 2, 2, False)]
    assert kept.rows == kept.teacher_rows == [0, 1, 2]


def test_a_step_that_accepts_nothing_keeps_one_row(book: RequestBook):
    req = prefilled(book)

    kept = verify_pass(book, [req], [Commit(1, (101,))], [1], 4, [(1, 1)])

    assert kept.segments == [Segment(1, True, 4, 1, [101], 5, 1, 3, 0, 1, False)]


def test_a_stop_inside_an_accepted_run_ends_the_rows_with_the_last_committed_token(book: RequestBook):
    req = prefilled(book)

    kept = verify_pass(book, [req], [Commit(1, (101, 2))], [4], 4, [(1, 1)])

    segment = kept.segments[0]
    assert (segment.tokens, segment.num_rows, segment.num_correct) == ([101, 2], 3, 3)
    assert kept.rows == [0, 1, 2]


def test_rows_of_each_request_stand_at_multiples_of_the_width(book: RequestBook):
    first, gone, second = prefilled(book), prefilled(book), prefilled(book, num_prompt=6)
    commits = [Commit(1, (101,)), None, Commit(3, (7, 8))]

    kept = verify_pass(book, [first, gone, second], commits, [1, 2, 2], 4, [(1, 1)] * 3)

    assert [(s.request, s.position, s.token_position) for s in kept.segments] == [(1, 4, 5), (3, 8, 9)]
    assert kept.rows == [0, 8, 9]


def test_the_first_step_after_a_swap_is_mixed_and_named_after_the_new_draft(book: RequestBook):
    req = prefilled(book)

    kept = verify_pass(book, [req], [Commit(1, (101,))], [1], 4, [(1, 2)])

    assert (kept.segments[0].version, kept.segments[0].is_mixed) == (2, True)


def test_a_retracted_request_delivers_its_rows_again_under_the_same_number(book: RequestBook):
    req = prefilled(book)
    verify_pass(book, [req], [Commit(1, (101, 102))], [2], 4, [(1, 1)])

    kept, started = prefill_pass(book, [req], [Commit(3, (103,))], [0], [7])

    assert kept.segments == [prefill_segment(1, 0, 7, [103], 7)]
    assert started == []


def test_a_request_first_seen_in_a_verify_step_is_not_captured(book: RequestBook):
    kept = verify_pass(book, [Req([1, 2])], [Commit(1, (5,))], [1], 4, [(1, 1)])

    assert kept.segments == []


def test_requests_are_numbered_by_us_in_order_of_sight(book: RequestBook):
    reqs = [Req([1]), Req([1]), Req([1])]

    numbers = [book.state_of(req).number for req in [*reqs, *reversed(reqs)]]

    assert numbers == [1, 2, 3, 3, 2, 1]


UNCAPTURED = {
    "it refuses": Req([1, 2], Params(custom_params={"onlinespec": {"capture": False}})),
    "it has an image": Req([1, 2], multimodal_inputs=object()),
    "it uses LoRA": Req([1, 2], lora_id="adapter"),
    "it brings embeddings for tokens": Req([1, 2], input_embeds=[[0.0]]),
}


@pytest.mark.parametrize("req", UNCAPTURED.values(), ids=UNCAPTURED.keys())
def test_a_request_is_served_and_not_captured_where(book: RequestBook, req: Req):
    kept, started = prefill_pass(book, [req], [Commit(0, (9,))], [0], [2])
    later = verify_pass(book, [req], [Commit(1, (9,))], [1], 4, [(1, 1)])
    req.finished_reason = Reason("stop")

    assert (kept.segments, kept.rows, started, later.segments, book.ended()) == ([], [], [], [], [])


@pytest.mark.parametrize(
    "custom",
    [
        None,
        {},
        {"other": 1},
        {"onlinespec": None},
        {"onlinespec": "no"},
        {"onlinespec": {"capture": True}},
        ["capture"],
    ],
)
def test_only_a_clear_refusal_is_one(book: RequestBook, custom: Any):
    _, started = prefill_pass(book, [Req([1], Params(custom_params=custom))], [Commit(0, (9,))], [0], [1])

    assert [message.tenant for message in started] == [""]


def test_a_tenant_is_taken_from_the_request(book: RequestBook):
    params = Params(custom_params={"onlinespec": {"tenant": "acme"}})

    _, started = prefill_pass(book, [Req([1], params)], [Commit(0, (9,))], [0], [1])

    assert started[0].tenant == "acme"


@pytest.mark.parametrize(
    ("temperature", "top_k", "is_greedy", "effective"),
    [(0.7, 20, False, 0.7), (0.7, 1, False, 0.0), (1.0, 1, False, 0.0), (0.7, 20, True, 0.0), (2, -1, False, 2.0)],
)
def test_the_temperature_told_is_the_one_the_verifier_uses(
    temperature: float, top_k: int, is_greedy: bool, effective: float
):
    book = RequestBook(is_greedy)

    _, started = prefill_pass(book, [Req([1], Params(temperature, top_k))], [Commit(0, (9,))], [0], [1])

    assert effective_temperature(temperature, top_k, is_greedy) == effective
    assert (started[0].temperature, started[0].top_k, started[0].top_p) == (effective, top_k, 0.9)


def test_a_request_is_ended_exactly_once_with_the_counters_of_sglang(book: RequestBook):
    running, done = prefilled(book), prefilled(book)
    before = book.ended()
    done.finished_reason = Reason("length")
    done.output_ids, done.spec_verify_ct, done.spec_num_correct_drafts = [1, 2, 3], 2, 5

    first, second = book.ended(), book.ended()

    assert (before, second) == ([], [])
    assert [(m.request, m.reason, m.num_verify_steps, m.num_correct_drafts, m.num_output_tokens) for m in first] == [
        (2, "length", 2, 5, 3)
    ]
    running.finished_reason = Reason("abort")
    assert [(m.request, m.reason) for m in book.ended()] == [(1, "abort")]


def test_tokens_after_a_stop_are_not_counted_as_output(book: RequestBook):
    req = prefilled(book)
    req.output_ids, req.finished_len, req.finished_reason = [1, 2, 3, 4], 2, Reason("stop")

    assert book.ended()[0].num_output_tokens == 2


def test_a_request_that_the_server_forgot_without_finishing_it_ends_as_an_abort():
    book, req = RequestBook(is_greedy=True), Req([1, 2])
    state = book.state_of(req)
    book.start(req, state, 0)

    assert book.ended() == []

    del req
    gc.collect()
    messages = book.ended()

    assert [(message.request, message.reason) for message in messages] == [(state.number, "abort")]
    assert book.ended() == []


def captured(book: RequestBook, num_requests: int) -> set[int]:
    return {state.number for state in (book.state_of(Req([1])) for _ in range(num_requests)) if state.is_captured}


@pytest.mark.parametrize("frac", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_requests_captured_is_the_one_asked_for(book: RequestBook, frac: float):
    book.sample_frac = frac

    found = captured(book, 4000)

    assert len(found) / 4000 == pytest.approx(frac, abs=0.025)
    assert book.num_sampled_out == 4000 - len(found)


def test_a_larger_share_only_adds_requests_and_neighbours_are_not_taken_together():
    few, many = ({n for n in range(1, 4001) if is_sampled(n, frac)} for frac in (0.2, 0.5))

    assert few < many
    for stride in (2, 3, 8):
        assert len([n for n in many if n % stride == 0]) == pytest.approx(len(many) / stride, rel=0.1)
    assert sum(n + 1 in many for n in many) == pytest.approx(len(many) / 2, rel=0.1)


def test_a_request_that_was_sampled_out_sends_nothing_whatever_the_share_becomes_meanwhile(book: RequestBook):
    book.sample_frac = 0.0
    req = Req([1, 2])
    kept, started = prefill_pass(book, [req], [Commit(0, (9,))], [0], [2])
    book.sample_frac = 1.0
    later = verify_pass(book, [req], [Commit(1, (9,))], [1], 4, [(1, 1)])
    req.finished_reason = Reason("stop")

    assert (kept.segments, started, later.segments, book.ended()) == ([], [], [], [])


def test_a_request_that_could_not_be_captured_is_not_counted_as_sampled_out(book: RequestBook):
    book.sample_frac = 0.0

    book.state_of(Req([1], lora_id="adapter"))

    assert book.num_sampled_out == 0
