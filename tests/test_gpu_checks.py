"""What the GPU checks need that a CPU can tell: the files they name, the models they serve, what they tell apart."""

import importlib.metadata
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer

from onlinespec.bench.client import Answer, Prompt
from onlinespec.draft.config import read_target
from onlinespec.draft.fresh import build_fresh_draft, fresh_config, read_embedding
from onlinespec.draft.header import aux_layers, target_digest
from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.world import WORLD
from onlinespec.world.corpus import prompts
from onlinespec.world.hf import AutoTokenizer, LlamaForCausalLM
from onlinespec.world.target import validation_loss
from tests.draft.tiny import build_draft, build_embedding, build_sample

ROOT = Path(__file__).parent.parent
HERE = ROOT / "benchmarks" / "gpu"
CHECKS = ("kernels", "boots", "rows", "closes", "tap", "swap", "trainer", "duty", "goodput", "profile")


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture
def scripts(monkeypatch):
    """Their folder is where Python looks first, as when they are run."""
    monkeypatch.syspath_prepend(str(HERE.parent))
    monkeypatch.syspath_prepend(str(HERE))


@pytest.fixture(scope="module")
def middle(tmp_path_factory) -> Path:
    """A target of the smallest shape after two steps."""
    folder = tmp_path_factory.mktemp("gpu") / "middle"
    options = ("--shape", "tiny", "--device", "cpu", "--steps", "2", "--quality-prompts", "0")
    done = run("benchmarks/gpu/middle.py", str(folder), *options)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_dry_run_names_every_check_and_its_limit_and_finds_the_files_and_options_of_all(tmp_path):
    done = run("benchmarks/gpu/checks.py", str(tmp_path / "out"), "--dry-run")

    assert done.returncode == 0, done.stdout + done.stderr
    for check in CHECKS:
        assert f"\n{check}: " in done.stdout
    assert done.stdout.count(", at most 540 s: ") == sum(
        line.startswith("  part ") for line in done.stdout.splitlines()
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="says what a machine without a GPU lacks")
def test_without_a_gpu_every_part_is_left_out_by_name(tmp_path):
    done = run("benchmarks/gpu/checks.py", str(tmp_path / "out"), "--only", "rows", "trainer")

    parts = json.loads((tmp_path / "out" / "summary.json").read_text())["parts"]
    assert done.returncode == 1
    assert "cannot: no CUDA device" in done.stdout
    assert [(row["check"], row["part"]) for row in parts] == [("rows", 1), ("rows", 2), ("rows", 3), ("trainer", 1)]
    assert {row["status"] for row in parts} == {"left out: no CUDA device"}


def test_parts_that_succeeded_are_not_played_again_and_the_others_are(scripts, monkeypatch, tmp_path):
    import checks
    from plan import Check

    monkeypatch.setattr(checks, "cannot", lambda check, out: "")
    count = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.open('a').write('x'); sys.exit(int(sys.argv[2]))"
    parts = tuple((sys.executable, "-c", count, f"OUT/{name}", status) for name, status in (("a", "0"), ("b", "3")))
    check = Check("counted", "", "", parts, has_server=False)

    first = checks.run_all([check], tmp_path, None, float("inf"))
    second = checks.run_all([check], tmp_path, None, float("inf"))
    third = checks.run_all([check], tmp_path, 1, float("inf"))

    rows = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert (first, second, third) == (False, False, True)
    assert [(row["part"], row["status"]) for row in rows] == [(1, 0), (2, 3)]
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("xx", "xx")


def test_every_file_with_a_test_that_wants_a_gpu_is_run_where_there_is_one(scripts):
    from plan import GPU_TESTS

    condition = "skipif(not torch.cuda.is_available()"
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if condition in path.read_text()]

    assert sorted(GPU_TESTS) == sorted(str(path.relative_to(ROOT)) for path in files if path != Path(__file__))


def test_a_second_try_begins_without_the_run_directory_and_the_json_of_the_first(scripts, monkeypatch, tmp_path):
    import checks
    from plan import Check

    monkeypatch.setattr(checks, "cannot", lambda check, out: "")
    leave = """import pathlib, sys
demo, found, kept = map(pathlib.Path, sys.argv[2:])
assert not demo.exists() and not found.exists(), "left over"
demo.mkdir()
(demo / "journal").touch()
for path in (found, kept):
    path.touch()
sys.exit(3)"""
    command = (sys.executable, "-c", leave, "--run-dir", "OUT/demo", "OUT/found.json", "OUT/kept")
    check = Check("left", "", "", (command,), has_server=False)

    checks.run_all([check], tmp_path, None, float("inf"))
    checks.run_all([check], tmp_path, None, float("inf"))

    rows = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [row["status"] for row in rows] == [3], (tmp_path / "left-1.log").read_text()
    assert (tmp_path / "kept").exists()


def test_nothing_is_started_that_the_time_left_cannot_hold(scripts, monkeypatch, tmp_path):
    import checks
    from plan import Check

    monkeypatch.setattr(checks, "cannot", lambda check, out: "")
    check = Check("late", "", "", ((sys.executable, "-c", "open('OUT/ran', 'w')"),), has_server=False)

    is_whole = checks.run_all([check], tmp_path, None, time.monotonic() + checks.MIN_PART_S)

    assert not is_whole
    assert list(tmp_path.iterdir()) == []


def made_by(monkeypatch, checks, status: int, least_s: float = 0.0) -> None:
    """A model made by a command of that status, which fails where an earlier try left anything."""
    make = "import os, sys; os.mkdir(sys.argv[1]); open(f'{sys.argv[1]}/part', 'w'); sys.exit(int(sys.argv[2]))"
    monkeypatch.setattr(checks, "cannot", lambda check, out: "")
    monkeypatch.setattr(
        checks, "PREPARED", {"model": (least_s, (sys.executable, "-c", make, "OUT/model", str(status)))}
    )


def test_a_model_whose_making_broke_off_is_made_anew_and_one_that_is_made_is_not(scripts, monkeypatch, tmp_path):
    import checks
    from plan import Check

    check = Check("asks", "", "", ((sys.executable, "-c", ""),), needs=("model",), has_server=False)

    found = []
    for status in (3, 0, 0):
        made_by(monkeypatch, checks, status)
        found.append(checks.run_all([check], tmp_path, 1, float("inf")))

    assert found == [False, True, True]
    assert (tmp_path / "model" / "part").exists()


def test_a_model_is_not_begun_in_less_time_than_it_wants_and_the_next_call_goes_on(scripts, monkeypatch, tmp_path):
    import checks
    from plan import Check

    made_by(monkeypatch, checks, 0, least_s=300.0)
    check = Check("asks", "", "", ((sys.executable, "-c", ""),), needs=("model",), has_server=False)

    is_whole = checks.run_all([check], tmp_path, None, time.monotonic() + 300.0)

    assert not is_whole
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("left", "is_out"), [((), False), (("boots-1.log",), True), (("boots-1.log", "boots.json"), False)]
)
def test_where_no_server_boots_the_checks_that_want_one_are_left_out(scripts, monkeypatch, tmp_path, left, is_out):
    import checks
    from plan import Check

    for name in ("has_sglang", "has_plugin"):
        monkeypatch.setattr(checks, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in left:
        (tmp_path / name).touch()

    found = [checks.cannot(Check(name, "", "", ()), tmp_path) for name in ("boots", "rows")]

    assert found == ["", "no server boots here, see boots-1.log" if is_out else ""]


def test_an_archive_has_what_was_found_and_no_model(scripts, tmp_path):
    import checks

    files = ("rows.json", "rows-1.log", "demo/demo.png", "demo/versions/1/config.json", "middle/trained.json", "a.bin")
    for name in files:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).touch()

    checks.pack(tmp_path / "out", tmp_path / "found.tgz")

    with tarfile.open(tmp_path / "found.tgz") as archive:
        assert sorted(archive.getnames()) == ["demo/demo.png", "rows-1.log", "rows.json"]


def test_a_part_over_its_limit_is_asked_to_end_so_that_it_can_end_its_server(scripts, tmp_path):
    import checks

    waits = ("sh", "-c", "trap 'echo ended; exit' TERM; while :; do sleep 1; done")

    status = checks.play(waits, tmp_path, tmp_path / "log", 2.0, checks.ENVIRONMENT)

    assert status == "over the time limit"
    assert (tmp_path / "log").read_text().endswith("ended\n")


def test_the_random_target_and_its_draft_are_ones_that_the_server_and_the_trainer_can_read(tmp_path):
    done = run("benchmarks/gpu/shapes.py", str(tmp_path), "--size", "tiny")

    assert done.returncode == 0, done.stderr
    facts = read_target(tmp_path)
    assert (facts.num_layers, facts.vocab_size) == (8, 2048)
    assert read_embedding(tmp_path).shape == (2048, facts.hidden_size)
    assert len(target_digest(tmp_path)) == 64
    config, weights = build_fresh_draft(tmp_path, seed=0, config_path=tmp_path / "draft")
    assert config.is_pruned
    assert weights["lm_head.weight"].shape == (512, facts.hidden_size)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 2048
    assert tokenizer.decode([2047]) == "<x2047>"
    first = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    assert len(tokenizer(first)["input_ids"]) == 512


def test_the_middle_target_loads_with_the_loss_that_was_reported_and_a_fresh_draft_fits_it(middle):
    reported = json.loads((middle / "trained.json").read_text())
    model = LlamaForCausalLM.from_pretrained(middle, dtype=torch.float32)

    loss = validation_loss(model, Tokenizer.from_file(str(WORLD / "tokenizer.json")))

    assert reported["steps"] == 2
    assert loss == pytest.approx(reported["validation_loss"], abs=1e-6)
    assert AutoTokenizer.from_pretrained(middle).chat_template
    facts = read_target(middle)
    assert len(set(aux_layers(fresh_config(facts), facts.num_layers))) == 3


@torch.inference_mode()
def forward_sample(target: Path, text: str, shift: int) -> Sample:
    """What the tap would have taken of one request, each row's hidden states `shift` rows further on."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    tokens_T = torch.tensor(tokenizer(text)["input_ids"])
    output = model.float()(tokens_T[None], output_hidden_states=True)
    aux_TA = torch.cat([output.hidden_states[layer][0] for layer in (2, 4, 5)], dim=-1)
    teacher = output.logits[0].topk(4)
    everywhere_T = torch.ones(len(tokens_T), dtype=torch.bool)
    return Sample(
        request=1,
        tenant="",
        num_prompt_tokens=1,
        temperature=0.0,
        tokens_T=tokens_T,
        aux_TA=aux_TA.roll(shift, dims=0),
        has_aux_T=everywhere_T,
        teacher_ids_Tk=teacher.indices,
        teacher_logits_Tk=teacher.values,
        teacher_lse_T=output.logits[0].logsumexp(1),
        has_teacher_T=everywhere_T,
        verify=VerifySteps(),
        finish_reason="stop",
        started_s=0.0,
        ended_s=1.0,
    )


def test_rows_of_another_position_are_told_from_the_right_ones(scripts, middle):
    from rows import Reference, summary

    text = next(prompts("code", 1))
    reference = Reference(middle, [2, 4, 5], "cpu")

    right = summary(reference, [forward_sample(middle, text, shift=0)])
    wrong = summary(reference, [forward_sample(middle, text, shift=1)])

    assert all(found["is_near"] for found in right.values())
    assert [name for name, found in wrong.items() if not found["is_near"]] == ["aux"]


def test_a_profile_counts_a_device_with_two_streams_busy_once(scripts):
    from decode_profile import summary

    def event(category: str, name: str, ts: float, dur: float) -> dict:
        return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur}

    events = [
        event("kernel", "gemm", 0, 4000),
        event("gpu_memcpy", "copy", 2000, 4000),
        event("kernel", "gemm", 9000, 1000),
    ]

    found = summary([*events, event("cpu_op", "aten::mm", 0, 500), {"ph": "M", "name": "process_name"}])

    assert found == {"busy_frac": 0.7, "device_ms": {"gemm": 5.0, "copy": 4.0}, "host_ms": {"aten::mm": 0.5}}


def answer(prompt: Prompt, text: str) -> Answer:
    found = Answer(prompt, 0.0)
    found.text = text
    return found


def test_prompts_are_asked_again_until_there_were_three_swaps(scripts, monkeypatch):
    import rows

    asked = [Prompt.of_text("demo", "one"), Prompt.of_text("demo", "two")]

    class Server:
        paths = SimpleNamespace(version=lambda number: None)
        num_versions = 1

        def swap(self, weights: dict) -> None:
            time.sleep(0.02)
            self.num_versions += 1

    server = Server()
    monkeypatch.setattr(rows, "SWAP_EVERY_S", 0.01)
    monkeypatch.setattr(rows, "read_draft", lambda folder: (None, {"a": torch.ones(2, 2)}))
    monkeypatch.setattr(rows, "ask", lambda _, prompts: time.sleep(0.005) or [answer(p, "yes") for p in prompts])

    answers = rows.ask_under_swaps(server, asked)

    assert server.num_versions - 1 >= 3
    assert [found.prompt for found in answers] == asked * (len(answers) // 2)
    assert len(answers) > 2


def test_answers_part_where_the_first_characters_differ_however_often_a_prompt_was_asked(scripts):
    import rows

    asked = [Prompt.of_text("demo", "one"), Prompt.of_text("demo", "two")]
    alone = [answer(asked[0], "abcd"), answer(asked[1], "xyz")]
    swapped = [*alone, answer(asked[0], "abXd"), answer(asked[1], "xyz")]

    found = rows.partings(SimpleNamespace(gap=lambda prompt, shared: (prompt, shared)), alone, swapped)

    assert found == [(asked[0], "ab")]


@pytest.mark.parametrize(
    ("counts", "on_cpu", "on_gpu"),
    [
        ([(True, 2.0, 2.0), (True, 1.5, 1.5)], True, True),
        ([(True, 2.0, 2.0), (False, 1.509, 1.5)], False, True),
        ([(True, 2.0, 2.0), (False, 1.48, 1.5)], False, False),
        ([], False, False),
    ],
)
def test_a_walk_may_differ_on_a_gpu_by_less_than_a_hundredth_of_a_token_and_on_a_cpu_not_at_all(
    scripts, counts, on_cpu, on_gpu
):
    from bench_shadow_fidelity import holds

    rows = [
        {"fidelity": "complete", "is_equal": equal, "live": live, "shadow": shadow} for equal, live, shadow in counts
    ]
    rows.append({"fidelity": "partial", "is_equal": False, "live": 3.0, "shadow": 1.0})

    assert (holds(rows, is_exact=True), holds(rows, is_exact=False)) == (on_cpu, on_gpu)


def test_the_plain_recipe_computes_where_the_embedding_table_lies(scripts):
    from plain_recipe import loss_of

    draft = build_draft().to("meta")

    loss = loss_of(draft, [build_sample(1, 5, 9), build_sample(2, 3, 12)], build_embedding().to("meta"), 3, 0.8)
    loss.backward()

    assert {parameter.grad.device.type for parameter in draft.parameters()} == {"meta"}


@pytest.mark.parametrize(("systems", "status"), [("plain;math;math, muon", 0), ("math;flex", 1)])
def test_a_system_that_does_not_run_fails_the_check_of_the_trainer_after_the_others_were_measured(
    scripts, monkeypatch, tmp_path, systems, status
):
    import trainer

    out = tmp_path / "out.json"
    monkeypatch.setattr(trainer, "REQUESTS", ((3, 5), (4, 2)))
    words = ["trainer.py", str(out), "--shape", "tiny", "--device", "cpu", "--rounds", "1", "--systems", systems]
    monkeypatch.setattr(sys, "argv", words)

    found = trainer.main()

    rows = json.loads(out.read_text())["rows"]
    assert found == status
    assert [row["system"] for row in rows] == systems.split(";")
    assert ["failed" in row for row in rows] == [row["system"] == "flex" for row in rows]


def test_a_result_names_the_versions_and_the_gpus_of_its_machine(scripts):
    from provenance import provenance

    found = provenance()

    assert found["versions"]["sglang"] == importlib.metadata.version("sglang")
    assert found["versions"]["torch"] == torch.__version__
    assert isinstance(found["gpus"], list)
