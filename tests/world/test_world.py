"""The shipped target and its tokenizer, as transformers loads them."""

import itertools

import pytest
from tokenizers import Tokenizer

from onlinespec.world import WORLD, corpus, quality
from onlinespec.world.tokenizer import VOCAB_SIZE, encode_chat, train_tokenizer


@pytest.fixture(scope="module")
def world():
    return quality.load(WORLD)


def test_the_tokenizer_gives_the_corpus_back_unchanged(world):
    _, tokenizer = world

    for request in itertools.islice(corpus.training(0), 300):
        for text in (request.user, request.answer):
            assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_the_tokenizer_keeps_every_digit_apart(world):
    _, tokenizer = world

    assert tokenizer.tokenize("order 90417") == [*tokenizer.tokenize("order "), "9", "0", "4", "1", "7"]


def test_the_chat_template_renders_what_the_target_was_trained_on(world):
    _, tokenizer = world
    messages = [("system", "Answer briefly."), ("user", "one"), ("assistant", "two"), ("user", "three")]
    chat = [{"role": role, "content": content} for role, content in messages]
    trained_on, _ = encode_chat(Tokenizer.from_file(str(WORLD / "tokenizer.json")), messages)

    rendered = tokenizer.apply_chat_template(chat, return_dict=False)
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)

    assert rendered == trained_on
    assert prompt == [*trained_on, tokenizer.convert_tokens_to_ids("<|assistant|>")]


def test_a_new_tokenizer_is_the_same_for_the_same_seed_and_fits_the_model():
    once, again = train_tokenizer(seed=5, num_conversations=500), train_tokenizer(seed=5, num_conversations=500)

    assert once.to_str() == again.to_str()
    assert once.get_vocab_size() <= VOCAB_SIZE


def test_a_chat_role_that_the_template_does_not_know_is_refused():
    with pytest.raises(ValueError, match="tool"):
        encode_chat(Tokenizer.from_file(str(WORLD / "tokenizer.json")), [("tool", "42")])


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_the_shipped_target_answers_live_prompts_with_their_details(world, domain):
    requests = list(itertools.islice(corpus.live(domain, 7), 4))

    answers = quality.generate(*world, [request.user for request in requests])

    assert all(answer.has_ended for answer in answers)
    assert sum(quality.copies(a.text, r.details) for a, r in zip(answers, requests, strict=True)) >= 3


def test_a_detail_inside_another_word_does_not_count_as_copied():
    assert quality.copies("the red kettle", ("red",))
    assert not quality.copies("the tired kettle", ("red",))


def test_the_shipped_folder_is_small_enough_for_git():
    assert sum(path.stat().st_size for path in WORLD.iterdir()) < 9_000_000
