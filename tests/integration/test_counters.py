"""Verify steps and correct drafts are the same integers, whoever counts: the bench streaming and not, SGLang's native
endpoint, and our own messages, on the same requests."""

import json
import urllib.request

import pytest

from onlinespec.bench.client import Answer
from onlinespec.bench.summary import accept_length, conversations
from tests.integration.servers import flush, send, world_prompts

NUM_PROMPTS = 12
MAX_TOKENS = 60


def counts_of_client(answers: list[Answer]) -> list[tuple[int, int, int]]:
    """(output tokens, verify steps, correct drafts) of each request."""
    return [(answer.num_output_tokens, answer.num_verify_steps, answer.num_correct_drafts) for answer in answers]


def counts_of_plugin(capture, since: int) -> list[tuple[int, int, int]]:
    """The same, as our `RequestEnded` told them."""
    return [(e.num_output_tokens, e.num_verify_steps, e.num_correct_drafts) for e in capture.ended[since:]]


def generate(server, prompt_ids: list[int]) -> dict:
    """SGLang's own /generate; the answer's meta_info."""
    body = {"input_ids": prompt_ids, "sampling_params": {"temperature": 0, "max_new_tokens": MAX_TOKENS}}
    request = urllib.request.Request(
        f"{server.base_url}/generate", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["meta_info"]


@pytest.fixture(scope="module")
def streamed(served, capture, learned):
    """(answers, samples, what the plugin told) of the prompts, one after the other."""
    flush(served)
    capture.drain()
    since = len(capture.ended)
    answers, samples = capture.send(
        world_prompts(NUM_PROMPTS, seed=41, domains=("code",)), concurrency=1, max_tokens=MAX_TOKENS
    )
    return answers, samples, counts_of_plugin(capture, since)


def test_a_streamed_answer_counts_what_the_plugin_counts(streamed):
    answers, _, told = streamed

    assert all(answer.has_counters for answer in answers)
    assert counts_of_client(answers) == told
    assert sum(correct for _, _, correct in told) > 50, "an untrained draft would make this test empty"
    for answer in answers:
        assert sum(answer.histogram) == answer.num_verify_steps
        assert sum(j * count for j, count in enumerate(answer.histogram)) == answer.num_correct_drafts


def test_without_a_stream_the_same_requests_count_the_same(served, capture, streamed):
    answers, _, told = streamed
    flush(served)
    capture.drain()
    since = len(capture.ended)

    whole = send(served, [answer.prompt for answer in answers], concurrency=1, max_tokens=MAX_TOKENS, is_streamed=False)
    capture.drain()

    assert [answer.text for answer in whole] == [answer.text for answer in answers]
    assert counts_of_client(whole) == counts_of_plugin(capture, since) == told
    assert [answer.histogram for answer in whole] == [answer.histogram for answer in answers]
    assert not any(answer.chunk_s for answer in whole)


def test_the_native_endpoint_counts_the_same(served, capture, streamed):
    answers, samples, told = streamed
    flush(served)
    since = len(capture.ended)

    metas = [generate(served, sample.tokens_T[: sample.num_prompt_tokens].tolist()) for sample in samples]
    capture.drain()

    native = [(m["completion_tokens"], m["spec_verify_ct"], m["spec_num_correct_drafts"]) for m in metas]
    assert native == counts_of_plugin(capture, since) == told
    assert [meta["spec_correct_drafts_histogram"] for meta in metas] == [answer.histogram for answer in answers]


def test_the_accept_length_shown_is_made_of_these_integers(streamed):
    answers, samples, told = streamed

    found = accept_length(list(conversations(answers).values()))

    steps, correct = sum(steps for _, steps, _ in told), sum(correct for _, _, correct in told)
    assert found.value == (steps + correct) / steps
    assert found.low < found.value < found.high
    assert sum(len(sample.verify) for sample in samples) == steps


def test_every_chunk_says_how_many_tokens_there_are(streamed):
    answers, _, _ = streamed

    for answer in answers:
        assert len(answer.chunk_tokens) == len(answer.chunk_s)
        assert answer.chunk_tokens == sorted(answer.chunk_tokens)
        assert len(answer.token_gaps_s) == answer.chunk_tokens[-1] - answer.chunk_tokens[0]
