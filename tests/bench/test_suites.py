"""Where prompts come from, and what is said of a file that holds none."""

import gzip
import json
import re
from itertools import islice
from pathlib import Path

import pytest

from onlinespec.bench.app import SUITES
from onlinespec.bench.client import Prompt
from onlinespec.bench.formats import FORMATS
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


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


LINES = {
    "mtbench": (
        {"question_id": 5, "category": "roleplay", "turns": ["Be a duck.", "Now a goose."], "x": 1},
        "roleplay",
    ),
    "gsm8k": ({"question": "2 ducks and 1?", "answer": "3 #### 3"}, "gsm8k"),
    "humaneval": ({"task_id": "T/0", "prompt": "def quack():\n", "entry_point": "quack"}, "humaneval"),
    "math500": ({"problem": "1+2", "solution": "3", "subject": "Ducks", "level": 1, "unique_id": "a"}, "Ducks"),
}
HUMANEVAL = "Complete this Python function. Answer with its code.\n\n```python\ndef quack():\n```"
ASKED = {"mtbench": "Be a duck.", "gsm8k": "2 ducks and 1?", "humaneval": HUMANEVAL, "math500": "1+2"}


@pytest.mark.parametrize("name", LINES)
def test_a_public_benchmark_is_read_in_its_own_format(write, name: str):
    line, domain = LINES[name]

    (found,) = load_suite(f"{name}:{write(line)}", 10, seed=0)

    follow_ups = ("Now a goose.",) if name == "mtbench" else ()
    assert found == Prompt(domain, user(ASKED[name]), follow_ups)


def test_a_packed_file_is_unpacked_and_a_damaged_one_refused(write, tmp_path: Path):
    packed = tmp_path / "HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(write(LINES["humaneval"][0]).read_bytes()))

    found = load_suite(f"humaneval:{packed}", 10, seed=0)

    packed.write_bytes(packed.read_bytes()[:-9])
    assert found == [Prompt("humaneval", user(HUMANEVAL))]
    with pytest.raises(BenchError, match=r"HumanEval\.jsonl\.gz: .*damaged, download it again"):
        load_suite(f"humaneval:{packed}", 10, seed=0)


def said(*pairs: tuple[str, str]) -> dict:
    return {"id": "a", "conversations": [{"from": speaker, "value": text} for speaker, text in pairs]}


def test_sharegpt_asks_the_first_human_turn_or_all_of_them_and_skips_chats_without_any(tmp_path: Path):
    chats = [said(("system", "S"), ("human", "A"), ("gpt", "B"), ("user", "C")), said(("gpt", "D")), said()]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(chats))

    assert load_suite(f"sharegpt:{path}", 10, seed=0) == [Prompt("sharegpt", user("A"))]
    assert load_suite(f"sharegpt-turns:{path}", 10, seed=0) == [Prompt("sharegpt", user("A"), ("C",))]


def test_a_longer_benchmark_is_drawn_from_with_the_seed_in_its_own_order(write):
    path = write(*({"question": str(n)} for n in range(100)))

    drawn = [load_suite(f"gsm8k:{path}", 10, seed=seed) for seed in (1, 1, 2)]

    places = [int(prompt.messages[0]["content"]) for prompt in drawn[0]]
    assert drawn[0] == drawn[1] != drawn[2]
    assert places == sorted(places) != list(range(10))
    assert [prompt.number for prompt in drawn[0]] == list(range(10))


@pytest.mark.parametrize("name", [*LINES, "sharegpt"])
def test_a_missing_benchmark_file_is_refused_with_where_to_get_it(tmp_path: Path, name: str):
    with pytest.raises(
        BenchError, match=rf"suite {name}: no file .*absent; download .* from https://.*, and give {name}:"
    ):
        load_suite(f"{name}:{tmp_path}/absent", 1, seed=0)
    with pytest.raises(BenchError, match=rf"suite {name}: no path; download"):
        load_suite(name, 1, seed=0)


@pytest.mark.parametrize(
    ("name", "line", "told"),
    [
        ("mtbench", {"question_id": 1, "category": "a", "turns": []}, "category, turns"),
        ("gsm8k", {"problem": "1+2"}, "question"),
        ("humaneval", {"task_id": "T/0"}, "task_id, prompt"),
        ("math500", {"question": "1+2"}, "problem, subject"),
    ],
)
def test_a_line_of_another_format_is_refused_with_the_fields_wanted(write, name: str, line: dict, told: str):
    path = write(LINES[name][0], line)

    with pytest.raises(BenchError, match=rf"mine\.jsonl:2: .*wanted one JSON object a line, with {told}"):
        load_suite(f"{name}:{path}", 10, seed=0)


def test_what_is_no_list_of_chats_is_refused(write):
    with pytest.raises(BenchError, match=r'mine\.jsonl: .*wanted a JSON list of \{"conversations"'):
        load_suite(f"sharegpt:{write(said(('human', 'A')))}", 10, seed=0)


@pytest.mark.parametrize("name", ["random", "random-ids", "random_ids", "generated-shared-prefix", "random:path"])
def test_random_tokens_are_refused_with_the_reason(name: str):
    with pytest.raises(BenchError, match=r"random tokens are no language"):
        load_suite(name, 10, seed=0)


def test_the_help_names_every_benchmark_that_can_be_read():
    told = re.findall(r"[\w-]+", SUITES)

    assert set(FORMATS) <= set(told)
