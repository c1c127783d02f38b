"""The demo's requests: deterministic, distinct, and different from domain to domain."""

import itertools
import random

import pytest

from onlinespec.world import corpus


def draw(domain: str, seed: int, count: int) -> list[corpus.Conversation]:
    return list(itertools.islice(corpus.live(domain, seed), count))


def test_the_same_seed_gives_the_same_requests_and_another_seed_gives_others():
    once = list(itertools.islice(corpus.prompts("code", 3), 50))
    again = list(itertools.islice(corpus.prompts("code", 3), 50))
    other = list(itertools.islice(corpus.prompts("code", 4), 50))

    assert once == again
    assert not set(once) & set(other)


def test_the_training_corpus_is_deterministic_and_visits_every_domain():
    once = list(itertools.islice(corpus.training(0), 200))
    again = list(itertools.islice(corpus.training(0), 200))

    assert once == again
    assert {request.domain for request in once} == set(corpus.DOMAINS)


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_a_thousand_requests_of_a_domain_have_a_thousand_answers(domain):
    answers = {request.answer for request in draw(domain, 0, 1000)}

    assert len(answers) >= 998


@pytest.mark.parametrize("domain", corpus.DOMAINS)
def test_every_detail_stands_in_the_prompt_and_in_the_answer(domain):
    for request in draw(domain, 0, 500):
        assert request.domain == domain
        assert all(detail in request.user and detail in request.answer for detail in request.details)


def test_live_answers_practically_never_occur_in_the_training_corpus():
    trained = {request.answer for request in itertools.islice(corpus.training(0), 20_000)}

    for domain in corpus.DOMAINS:
        assert sum(request.answer in trained for request in draw(domain, 0, 500)) <= 1


def test_domains_share_no_answers_and_few_words():
    answers = {domain: {r.answer for r in draw(domain, 0, 500)} for domain in corpus.DOMAINS}
    words = {domain: {word for text in answers[domain] for word in text.split()} for domain in corpus.DOMAINS}

    for first, second in itertools.combinations(corpus.DOMAINS, 2):
        assert not answers[first] & answers[second]
        assert len(words[first] & words[second]) < 0.1 * min(len(words[first]), len(words[second]))


def test_the_shift_goes_from_one_known_domain_to_another():
    assert corpus.FIRST_DOMAIN in corpus.DOMAINS
    assert corpus.SHIFT_DOMAIN in corpus.DOMAINS
    assert corpus.FIRST_DOMAIN != corpus.SHIFT_DOMAIN


def test_an_unknown_domain_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown domain 'poems'; expected one of code, records"):
        corpus.conversation("poems", random.Random(0))
