"""One request over HTTP: what is read from a stream, from a whole answer, and from a stream that breaks."""

import asyncio
from collections.abc import Iterator

import openai
import pytest

from onlinespec.bench.client import Answer, Prompt, Sampling, converse
from tests.bench.stand_in import HISTOGRAM, StandIn, stand_in

HELLO = Prompt.of_text("chat", "Hello")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as running:
        yield running


def held(server: StandIn, prompt: Prompt = HELLO, **sampling) -> list[Answer]:
    async def run() -> list[Answer]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await converse(client, "stand-in", prompt, Sampling(**sampling))

    return asyncio.run(run())


@pytest.mark.parametrize("is_streamed", [True, False])
def test_streamed_or_whole_an_answer_holds_the_text_and_the_servers_counters(server: StandIn, is_streamed: bool):
    (answer,) = held(server, is_streamed=is_streamed)

    assert (answer.text, answer.finish_reason, answer.error) == ("one two three", "stop", "")
    assert (answer.num_prompt_tokens, answer.num_output_tokens) == (3, 6)
    assert (answer.has_counters, answer.num_verify_steps, answer.num_correct_drafts) == (True, 3, 4)
    assert answer.histogram == HISTOGRAM
    assert answer.sent_s < answer.end_s <= answer.done_s


def test_a_stream_is_timed_chunk_by_chunk_and_token_by_token(server: StandIn):
    (answer,) = held(server)

    assert answer.chunk_tokens == [2, 4, 6]
    assert len(answer.gaps_s) == 2
    assert len(answer.token_gaps_s) == 4
    assert sum(answer.token_gaps_s) == pytest.approx(answer.chunk_s[-1] - answer.chunk_s[0])


def test_a_whole_answer_has_no_chunks(server: StandIn):
    (answer,) = held(server, is_streamed=False)

    assert (answer.chunk_s, answer.gaps_s, answer.token_gaps_s) == ([], [], [])


def test_chunks_of_a_server_that_does_not_count_as_it_streams_have_no_token_times():
    answer = Answer(HELLO, 0.0, chunk_s=[1.0, 2.0, 3.0], chunk_tokens=[])

    assert answer.token_gaps_s == []
    assert len(answer.gaps_s) == 2


def test_without_counters_an_answer_is_an_answer_still(server: StandIn):
    server.has_counters = False

    (answer,) = held(server)

    assert (answer.has_counters, answer.num_verify_steps, answer.error) == (False, 0, "")


def test_a_later_turn_is_asked_behind_the_models_own_answer(server: StandIn):
    prompt = Prompt("chat", HELLO.messages, ("And then?", "Bye"), number=7)

    answers = held(server, prompt)

    assert [(answer.prompt.number, answer.prompt.turn) for answer in answers] == [(7, 0), (7, 1), (7, 2)]
    assert [(m["role"], m["content"]) for m in server.asked[-1]["messages"]] == [
        ("user", "Hello"),
        ("assistant", "one two three"),
        ("user", "And then?"),
        ("assistant", "one two three"),
        ("user", "Bye"),
    ]


def test_a_conversation_ends_at_the_first_turn_that_failed(server: StandIn):
    server.refuses = {"And then?"}

    answers = held(server, Prompt("chat", HELLO.messages, ("And then?", "Bye")))

    assert [bool(answer.error) for answer in answers] == [False, True]
    assert "too long" in answers[1].error
    assert not answers[1].is_cut, "the server answered, if only to refuse"


def test_a_server_that_dies_in_the_middle_of_a_stream_is_an_error_in_the_answer(server: StandIn):
    server.dies_at = 1

    (answer,) = held(server)

    assert answer.is_cut
    assert answer.error
    assert answer.text == "one"


def test_a_seed_is_sent_only_where_something_is_sampled(server: StandIn):
    held(server, seed=5)
    held(server, seed=5, temperature=0.7)

    assert "seed" not in server.asked[0]
    assert (server.asked[1]["seed"], server.asked[1]["temperature"]) == (5, 0.7)
