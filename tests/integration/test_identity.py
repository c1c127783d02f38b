"""Speculation with swaps under way changes no answer: against stock SGLang without speculation."""

import threading

import torch

from onlinespec.operate import roll_back
from onlinespec.versions.journal import Journal
from onlinespec.versions.state import state_of
from onlinespec.wire.messages import GetStatus, Swap
from tests.integration.conftest import IDENTITY_TOKENS
from tests.integration.servers import send

MAX_GAP = 1e-4


def logit_gap(model, tokenizer, prompt: str, shared: str) -> float:
    """Difference of the target's two best logits where two answers part; `shared` is what they agree on."""
    chat = [{"role": "user", "content": prompt}]
    head = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(head + shared, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        best = model(ids).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def test_a_hundred_greedy_answers_are_the_same_while_drafts_are_swapped_under_load(
    plain_answers, served, learned, identity_prompts, transformers_target
):
    model, tokenizer = transformers_target
    swaps_before = served.control.request(GetStatus()).num_swaps
    is_done = threading.Event()

    def swap_to_and_fro() -> None:
        while not is_done.wait(2.0):
            incumbent = state_of(Journal(served.paths).read()).incumbent
            roll_back(served.paths.root, to=1 if incumbent == 2 else 2)

    swapper = threading.Thread(target=swap_to_and_fro)
    swapper.start()
    answers = send(served, identity_prompts, max_tokens=IDENTITY_TOKENS)
    is_done.set()
    swapper.join()
    num_swaps = served.control.request(GetStatus()).num_swaps - swaps_before
    if served.control.request(GetStatus()).version != 2:
        roll_back(served.paths.root, to=2)

    mismatches = []
    for answer in answers:
        prompt = answer.prompt.messages[0]["content"]
        expected = plain_answers[prompt]
        if answer.text != expected:
            shared = next(i for i in range(len(expected) + 1) if answer.text[: i + 1] != expected[: i + 1])
            mismatches.append(logit_gap(model, tokenizer, prompt, expected[:shared]))
    print(f"{len(answers)} answers, {num_swaps} swaps, {len(mismatches)} mismatches with logit gaps {mismatches}")
    assert num_swaps >= 5
    assert sum(answer.num_correct_drafts for answer in answers) > len(answers), "drafts are accepted, whichever is in"
    assert all(gap < MAX_GAP for gap in mismatches), mismatches


def test_a_version_with_other_bytes_than_its_digest_is_refused_and_the_draft_stays(served, learned):
    before = served.control.request(GetStatus())

    ack = served.control.acknowledged(Swap(1, str(served.paths.version(1)), "0" * 64))

    after = served.control.request(GetStatus())
    assert not ack.is_ok
    assert "digest" in ack.message
    assert (after.version, after.num_swaps) == (before.version, before.num_swaps)
