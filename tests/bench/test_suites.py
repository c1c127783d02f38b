"""Where prompts come from, and what is said of a file that holds none."""

import json
from itertools import islice
from pathlib import Path

import pytest

from onlinespec.bench.client import Prompt
from onlinespec.bench.suites import load_suite
from onlinespec.errors import BenchError
from onlinespec.world.corpus import DOMAINS, prompts

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture
def write(tmp_path: Path):
    def write_lines(*lines: object) -> Path:
        path = tmp_path / "mine.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write_lines


def test_a_line_holds_a_prompt_or_a_chat_and_may_name_its_domain(write):
    path = write({"prompt": "Hello"}, "", {"messages": CHAT, "domain": "why"}, {"prompt": "Bye", "domain": "end"})

    found = load_suite(str(path), 10, seed=0)

    assert found == [
        Prompt("mine", ({"role": "user", "content": "Hello"},)),
        Prompt("why", tuple(CHAT)),
        Prompt("end", ({"role": "user", "content": "Bye"},)),
    ]


def test_no_more_prompts_are_read_than_asked_for(write):
    path = write({"prompt": "1"}, {"prompt": "2"}, "not reached")

    assert len(load_suite(str(path), 2, seed=0)) == 2


BAD_LINES = {
    "no JSON": ("{", "not JSON"),
    "a list": (["Hello"], "wanted"),
    "neither form": ({"text": "Hello"}, "wanted"),
    "a prompt that is no text": ({"prompt": 5}, "wanted"),
    "no messages": ({"messages": []}, "wanted"),
    "a message without a role": ({"messages": [{"content": "x"}]}, "wanted"),
    "messages that are no list": ({"messages": CHAT[0]}, "wanted"),
}


@pytest.mark.parametrize(("line", "told"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_refused_by_file_and_line(write, line: object, told: str):
    path = write({"prompt": "fine"}, "", line)

    with pytest.raises(BenchError) as caught:
        load_suite(str(path), 10, seed=0)

    assert str(caught.value).startswith(f"{path}:3: ")
    assert told in str(caught.value)


def test_a_file_that_is_missing_or_empty_is_refused_by_name(write, tmp_path: Path):
    with pytest.raises(BenchError, match=r"absent\.jsonl: no such file; give `demo`"):
        load_suite(str(tmp_path / "absent.jsonl"), 1, seed=0)
    with pytest.raises(BenchError, match=r"mine\.jsonl: no prompts in it"):
        load_suite(str(write("", "")), 1, seed=0)


def test_the_demo_suite_takes_its_domains_in_turn():
    found = load_suite("demo", 2 * len(DOMAINS), seed=3)

    assert [prompt.domain for prompt in found] == list(DOMAINS) * 2
    for domain in DOMAINS:
        texts = [prompt.messages[0]["content"] for prompt in found if prompt.domain == domain]
        assert texts == list(islice(prompts(domain, 3), 2))


def test_one_domain_of_the_demo_can_be_chosen_and_an_unknown_one_is_refused_with_those_there_are():
    first = next(iter(DOMAINS))

    assert {prompt.domain for prompt in load_suite(f"demo:{first}", 5, seed=1)} == {first}
    with pytest.raises(BenchError, match=rf"suite demo:nope: no such demo domain; wanted one of .*{first}"):
        load_suite("demo:nope", 5, seed=1)
