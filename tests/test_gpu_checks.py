"""What the GPU checks need that a CPU can tell: the files they name, the model they serve."""

import subprocess
import sys
from pathlib import Path

import pytest

from onlinespec.draft.config import read_target
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.header import target_digest
from onlinespec.world.hf import AutoTokenizer

ROOT = Path(__file__).parent.parent


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_dry_run_names_every_check_and_finds_the_files_of_all(tmp_path):
    done = run("benchmarks/gpu/checks.py", str(tmp_path / "out"), "--dry-run")

    assert done.returncode == 0, done.stdout + done.stderr
    for check in ("closes", "rows", "tap", "swap", "trainer", "goodput"):
        assert f"\n{check}: " in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="says what a machine without a GPU lacks")
def test_without_a_gpu_every_check_is_left_out_by_name(tmp_path):
    done = run("benchmarks/gpu/checks.py", str(tmp_path / "out"), "--only", "rows", "trainer")

    assert done.returncode == 1
    assert "cannot: no CUDA device" in done.stdout
    assert (tmp_path / "out" / "summary.json").read_text().count("left_out") == 2


def test_the_random_target_is_one_that_the_server_and_the_trainer_can_read(tmp_path):
    done = run("benchmarks/gpu/shapes.py", str(tmp_path), "--size", "tiny")

    assert done.returncode == 0, done.stderr
    facts = read_target(tmp_path)
    assert (facts.num_layers, facts.vocab_size) == (4, 2048)
    assert read_embedding(tmp_path).shape == (2048, facts.hidden_size)
    assert len(target_digest(tmp_path)) == 64
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 2048
    assert tokenizer.decode([2047]) == "<x2047>"
