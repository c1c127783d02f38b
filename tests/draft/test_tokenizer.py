"""A draft's own tokenizer is the target's, or the draft is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from onlinespec.draft.tokenizer import check_tokenizer
from onlinespec.errors import CheckpointError


def write(folder: Path, vocab: Any, added: Any = None) -> Path:
    folder.mkdir()
    raw = {"model": {"vocab": vocab}} | ({"added_tokens": added} if added is not None else {})
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


def test_the_same_vocabulary_passes_in_another_order_form_and_with_other_merges(tmp_path: Path):
    target = write(tmp_path / "target", {"a": 0, "b": 1, "<end>": 2})

    check_tokenizer(write(tmp_path / "order", {"<end>": 2, "b": 1, "a": 0}), target)
    check_tokenizer(write(tmp_path / "unigram", [["a", -1.0], ["b", -2.0], ["<end>", 0.0]]), target)
    check_tokenizer(write(tmp_path / "added", {"a": 0, "b": 1}, [{"id": 2, "content": "<end>"}]), target)


def test_a_draft_or_a_target_without_a_tokenizer_file_passes(tmp_path: Path):
    (tmp_path / "none").mkdir()
    some = write(tmp_path / "some", {"a": 0})

    check_tokenizer(tmp_path / "none", some)
    check_tokenizer(some, tmp_path / "none")


@pytest.mark.parametrize(
    ("vocab", "told"),
    [
        ({"a": 0, "x": 1}, "1 of 2 tokens differ from the target's: id 1 is 'x'"),
        ({"a": 0}, "id 1 is None"),
        ({"b": 0, "a": 1}, "2 of 2 tokens differ"),
        ([["a", 0.0], ["b", 0.0], ["c", 0.0]], "id 2 is 'c'"),
    ],
)
def test_another_vocabulary_is_refused_naming_both_files(tmp_path: Path, vocab: Any, told: str):
    target, draft = write(tmp_path / "target", {"a": 0, "b": 1}), write(tmp_path / "draft", vocab)

    with pytest.raises(CheckpointError) as caught:
        check_tokenizer(draft, target)

    assert told in str(caught.value)
    assert str(caught.value).startswith(f"{draft}/tokenizer.json")
    assert f"{target}/tokenizer.json says" in str(caught.value)


@pytest.mark.parametrize("text", ["[", "{}", '{"model": {"vocab": [1, 2]}}', '{"model": {"vocab": {"a": "x"}}}'])
def test_a_damaged_tokenizer_is_refused_by_name(tmp_path: Path, text: str):
    target, draft = write(tmp_path / "target", {"a": 0}), write(tmp_path / "draft", {})
    (draft / "tokenizer.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"draft/tokenizer\.json: not "):
        check_tokenizer(draft, target)
