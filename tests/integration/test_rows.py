"""The tap on the real server: rows against a teacher-forced forward, walks against the live counters."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from onlinespec.bench.client import Prompt
from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.model import Draft
from onlinespec.wire.messages import GetStatus, SetCapture
from onlinespec.world import WORLD
from tests.integration.drafted import compare_with_probe, count_walked, probe
from tests.integration.servers import flush, world_prompts

FIRST_PROMPT = world_prompts(1, seed=23)[0].messages[0]["content"]


@pytest.fixture(scope="module")
def embed_VD():
    return read_embedding(WORLD).float()


def draft_in_service(served) -> Draft:
    config, weights = read_draft(served.paths.version(served.control.request(GetStatus()).version))
    return Draft(config, weights)


def test_rows_are_those_of_a_teacher_forced_forward_and_tokens_those_of_the_answer(learned, transformers_target):
    model, _ = transformers_target
    layers = [2, model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 3]

    for sample in learned[:8]:
        with torch.inference_mode():
            output = model(sample.tokens_T[None], output_hidden_states=True)
        aux_TA = torch.cat([output.hidden_states[layer][0] for layer in layers], dim=-1)
        logits_TV = output.logits[0]

        torch.testing.assert_close(sample.aux_TA[sample.has_aux_T], aux_TA[sample.has_aux_T], atol=2e-4, rtol=1e-4)
        taught = sample.has_teacher_T
        expected = logits_TV[taught].gather(1, sample.teacher_ids_Tk[taught])
        torch.testing.assert_close(sample.teacher_logits_Tk[taught], expected, atol=2e-4, rtol=1e-4)
        lse = logits_TV[taught].logsumexp(1)
        torch.testing.assert_close(sample.teacher_lse_T[taught], lse, atol=2e-4, rtol=1e-4)


def test_samples_are_complete_and_decode_to_the_streamed_answers(capture, learned, transformers_target):
    _, tokenizer = transformers_target
    asked = world_prompts(12, seed=29)

    answers, samples = capture.send(asked, max_tokens=80, tenant="acme")

    texts = {tokenizer.decode(s.tokens_T[s.num_prompt_tokens :], skip_special_tokens=True) for s in samples}
    assert texts == {answer.text for answer in answers}
    assert all(sample.is_complete for sample in samples)
    assert {sample.tenant for sample in samples} == {"acme"}
    assert capture.assembler.counters["rows_completed"] > capture.assembler.counters["rows_missing"] == 0


def test_the_walk_of_the_draft_in_service_equals_the_live_counters_of_every_request(served, capture, learned, embed_VD):
    draft = draft_in_service(served)
    flush(served)

    _, samples = capture.send(world_prompts(60, seed=31), max_tokens=120)

    num_correct = count_walked(draft, samples, embed_VD)
    assert len(samples) == 60
    assert num_correct > 100, "an untrained draft would make this test empty"


def test_the_plugins_counters_equal_those_of_the_openai_answer(capture, learned):
    answers, samples = capture.send(world_prompts(8, seed=37), concurrency=1, max_tokens=60)

    for answer, sample in zip(answers, samples, strict=True):
        assert len(sample.verify) == answer.num_verify_steps == sum(answer.histogram)
        assert sum(sample.verify.num_correct) == answer.num_correct_drafts
        assert sample.num_answer_tokens == answer.num_output_tokens


def test_drafted_tokens_and_logits_equal_those_of_sglang_on_the_same_rows(served, capture, learned, embed_VD):
    draft = draft_in_service(served)
    flush(served)

    samples, records = probe(served, capture, num_prompts=10)

    num_compared, largest = compare_with_probe(draft, samples, records, embed_VD)
    print(f"{num_compared} drafted tokens equal, logits differ by at most {largest:.1e}")
    assert num_compared > 300
    assert largest < 1e-4


def test_a_request_that_refuses_capture_is_served_and_leaves_no_row(served, capture, learned):
    client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none")
    before = len(capture.started)

    answer = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": FIRST_PROMPT}],
        max_tokens=20,
        extra_body={"custom_params": {"onlinespec": {"capture": False}}},
    )
    samples = capture.drain()

    assert answer.usage.completion_tokens > 1
    assert not samples
    assert len(capture.started) == before


def test_each_choice_of_n_is_captured_as_a_request_of_its_own(served, capture, learned):
    client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="none")

    client.chat.completions.create(
        model="any", messages=[{"role": "user", "content": FIRST_PROMPT}], max_tokens=24, n=2, temperature=0
    )
    samples = capture.drain()

    assert len(samples) == 2
    assert len({sample.request for sample in samples}) == 2
    assert samples[0].answer_key == samples[1].answer_key


def test_an_aborted_request_ends_in_the_samples_too(served, capture, learned):
    async def hang_up() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.base_url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model="any",
                messages=[{"role": "user", "content": FIRST_PROMPT}],
                max_tokens=1500,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(hang_up())
    capture.drain()
    capture.send([Prompt.of_text("code", "one more request so that the scheduler looks again")], max_tokens=8)

    assert capture.ended[-2].reason == "abort"


def test_a_share_of_requests_is_captured_and_the_running_ones_are_counted_either_way(served, capture):
    def counter(name: str) -> int:
        return served.control.request(GetStatus()).counters[name]

    left_out, running = counter("requests_sampled_out"), set()
    capture.started.clear()
    served.control.acknowledged(SetCapture(True, 0.5))
    share = served.control.request(GetStatus()).sample_frac
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(capture.send, world_prompts(40, seed=31), max_tokens=24)
        while not sending.done():
            running.add(counter("running_requests"))
            time.sleep(0.05)
    answers, samples = sending.result()
    served.control.acknowledged(SetCapture(True, 1.0))

    assert (share, len(answers)) == (0.5, 40)
    assert 8 <= len(samples) == len(capture.started) <= 32
    assert counter("requests_sampled_out") - left_out == 40 - len(samples)
    assert max(running) >= 2
    assert counter("running_requests") == 0
