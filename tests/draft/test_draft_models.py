"""The shipped shapes are drafts as we would write them, and their table tells the truth."""

import json
import math
import re
from pathlib import Path

import pytest

from onlinespec.draft.config import parse_draft_config
from onlinespec.draft.header import MAP_NAMES, canonical_names

FOLDER = Path(__file__).parents[2] / "configs" / "draft_models"
FILES = sorted(FOLDER.glob("*.json"))


def table() -> dict[str, list[str]]:
    """File name -> the other cells of its row in the README."""
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \|$", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_the_table_names_every_file_and_no_other():
    assert list(table()) != []
    assert sorted(table()) == [file.name for file in FILES]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_shape_is_a_config_as_we_write_it(file):
    raw = json.loads(file.read_text())

    assert parse_draft_config(raw, file).to_json() == raw


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_table_gives_the_sizes_that_the_code_gives(file):
    config = parse_draft_config(json.loads(file.read_text()), file)
    count = sum(math.prod(shape) for name, shape in canonical_names(config).items() if name not in MAP_NAMES)

    assert table()[file.name][1:] == [
        f"{config.hidden_size:,}",
        str(config.num_layers),
        f"{config.intermediate_size:,}",
        f"{config.num_heads} / {config.num_kv_heads}",
        f"{config.draft_vocab_size:,}",
        f"{count / 1e6:,.0f} M",
    ]
