"""Rows from a data set are those of a plain forward pass, and what cannot be used is counted by name."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from onlinespec.draft.header import target_digest
from onlinespec.draft.start import read_start_config
from onlinespec.errors import DataError
from onlinespec.offline.chat import read_chats
from onlinespec.offline.dataset import record_dataset
from onlinespec.offline.rows import TargetRows
from onlinespec.record.reader import Recording
from onlinespec.world import WORLD
from onlinespec.world.corpus import live
from onlinespec.world.hf import AutoModelForCausalLM, AutoTokenizer

ROLES = {"user": "human", "assistant": "gpt"}


def build_rows(**changes) -> TargetRows:
    settings = {"teacher_top_k": 8, "temperature": 0.0, "max_tokens": 2048, "generate_tokens": None, "tenant": "data"}
    return TargetRows(WORLD, read_start_config("init", WORLD), **(settings | changes))


@pytest.fixture(scope="module")
def rows() -> TargetRows:
    return build_rows()


@pytest.fixture
def counted(rows: TargetRows) -> TargetRows:
    rows.counters.clear()
    return rows


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(WORLD, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(WORLD)


def chat(count: int, domain: str = "code") -> list[dict[str, str]]:
    """One conversation of several turns."""
    turns = [
        ({"role": "user", "content": c.user}, {"role": "assistant", "content": c.answer})
        for c in itertools.islice(live(domain, 3), count)
    ]
    return [message for pair in turns for message in pair]


@torch.inference_mode()
def test_every_assistant_turn_has_the_rows_of_a_plain_forward_over_what_stands_before_and_in_it(
    counted: TargetRows, model, tokenizer
):
    messages = chat(3)

    samples = list(counted.samples(messages))

    assert len(samples) == 3
    for turn, sample in enumerate(samples):
        before = tokenizer.apply_chat_template(messages[: 2 * turn + 1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
        answer = tokenizer(messages[2 * turn + 1]["content"] + "<|end|>", add_special_tokens=False)["input_ids"]
        assert sample.tokens_T.tolist() == prompt + answer
        assert sample.num_prompt_tokens == len(prompt)
        out = model(torch.tensor([prompt + answer]), output_hidden_states=True)
        aux_TA = torch.cat([out.hidden_states[layer][0] for layer in (2, 4, 5)], dim=-1)
        torch.testing.assert_close(sample.aux_TA[:-1], aux_TA[:-1], atol=1e-4, rtol=1e-4)
        taught = slice(len(prompt) - 1, len(prompt + answer) - 1)
        logits_NV = out.logits[0, taught]
        torch.testing.assert_close(sample.teacher_logits_Tk[taught], logits_NV.topk(8).values, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(sample.teacher_lse_T[taught], logits_NV.logsumexp(-1), atol=1e-3, rtol=1e-4)
        assert sample.has_teacher_T.nonzero().squeeze(1).tolist() == list(range(taught.start, taught.stop))
        assert sample.has_aux_T.tolist() == [True] * (len(prompt + answer) - 1) + [False]
    assert len({sample.group for sample in samples}) == 1
    assert counted.facts.target_digest == target_digest(WORLD)
    assert counted.counters == {"conversations": 1, "samples": 3}


@torch.inference_mode()
def test_generated_answers_are_what_the_target_would_say_greedily(model, tokenizer):
    rows = build_rows(generate_tokens=24)
    messages = chat(1)

    (sample,) = rows.samples(messages)

    tokens, start = sample.tokens_T.tolist(), sample.num_prompt_tokens
    argmax = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
    assert tokens[start:] == argmax[start - 1 : -1]
    assert 2 <= len(tokens) - start <= 24
    assert sample.finish_reason == ("stop" if tokens[-1] == 2 else "length")


def test_what_cannot_be_used_is_counted_by_its_name(counted: TargetRows):
    user, answer = chat(1)
    cases = {
        "conversations_without_an_answer": [user],
        "answers_too_short": [user, {"role": "assistant", "content": ""}],
        "turns_too_long": [{"role": "user", "content": "x " * 3000}, answer],
    }
    for name, messages in cases.items():
        counted.counters.clear()

        assert list(counted.samples(messages)) == [], name

        assert counted.counters == {"conversations": 1, name: 1}


def test_a_turn_that_the_template_renders_otherwise_later_is_left_out_and_the_last_one_kept(tokenizer):
    rows, messages = build_rows(), chat(2)
    # As templates do that drop the thoughts of earlier answers.
    kept = "(message['content'] if message['role'] == 'user' or loop.last else 'gone')"
    rows._tokenizer.chat_template = rows._tokenizer.chat_template.replace("message['content']", kept)

    (sample,) = rows.samples(messages)

    text = tokenizer.decode(sample.tokens_T)
    assert text.endswith(messages[3]["content"] + "<|end|>")
    assert "<|assistant|>gone<|end|>" in text
    left_out = {"turns_the_template_renders_otherwise_in_the_whole": 1}
    assert rows.counters == {"conversations": 1, "samples": 1} | left_out


def test_a_conversation_that_the_template_refuses_is_counted():
    rows = build_rows()
    rows._tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"

    assert list(rows.samples(chat(1))) == []

    assert rows.counters == {"conversations": 1, "conversations_refused_by_the_template": 1}


def write_jsonl(path: Path, entries: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    return path


def test_sharegpt_and_openai_lines_read_alike(tmp_path: Path):
    messages = chat(2)
    turns = [{"from": ROLES[message["role"]], "value": message["content"]} for message in messages]
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": messages}, {"conversations": turns}])

    assert list(read_chats(file)) == [messages, messages]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", r"d\.jsonl:2: not JSON"),
        ("[]", r"d\.jsonl:2: wanted"),
        ('{"messages": [{"role": "user"}]}', r"d\.jsonl:2: wanted"),
        ('{"conversations": [{"from": "gtp", "value": "x"}]}', r'd\.jsonl:2: "from" is \'gtp\', wanted one of human'),
    ],
)
def test_a_line_that_is_no_conversation_is_refused_by_its_number(tmp_path: Path, line: str, told: str):
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": chat(1)}) + "\n" + line + "\n")

    with pytest.raises(DataError, match=told):
        list(read_chats(tmp_path / "d.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        list(read_chats(tmp_path / "absent.jsonl"))


def test_a_data_set_becomes_a_recording_within_its_bound(tmp_path: Path, counted: TargetRows):
    chats = [
        {"messages": [{"role": "user", "content": c.user}, {"role": "assistant", "content": c.answer}]}
        for c in itertools.islice(live("code", 1), 6)
    ]
    file = write_jsonl(tmp_path / "d.jsonl", chats)
    sizes = {"source": "d.jsonl", "shard_bytes": 300_000, "console": Console(quiet=True)}

    record_dataset(file, counted, tmp_path / "all", max_bytes=10**8, **sizes)
    record_dataset(file, counted, tmp_path / "some", max_bytes=800_000, **sizes)

    found = Recording(tmp_path / "all")
    assert len(found) == len(list(found)) == 6
    assert (found.manifest.tenants, found.manifest.sources) == (("data",), ("d.jsonl",))
    assert 0 < len(Recording(tmp_path / "some")) < 6


def test_a_data_set_without_a_usable_answer_is_refused_with_the_reasons(tmp_path: Path, counted: TargetRows):
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])

    with pytest.raises(DataError, match="conversations_without_an_answer 1"):
        record_dataset(
            file, counted, tmp_path / "r", source="x", shard_bytes=10, max_bytes=10**6, console=Console(quiet=True)
        )
