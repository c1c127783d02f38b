"""What cannot be served is refused by `serve` before SGLang is imported: one line with found and wanted.

Most cases ask `plan`, or the part of it that judges drafts, which start nothing; the command line itself runs
where the process matters.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onlinespec.config import Config, FloorConfig, TrainerConfig
from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.fresh import build_fresh_draft
from onlinespec.errors import ConfigError, OnlinespecError, SiteError, StartError
from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths
from onlinespec.plugin.sites import installed_sglang
from onlinespec.provision import provision_draft
from onlinespec.serve import Plan, plan
from onlinespec.versions.journal import Journal, Promoted, Published, RolledBack, ServerStarted, TargetChanged
from onlinespec.versions.state import state_of
from onlinespec.versions.store import VersionStore
from tests.draft.tiny import build_draft, write_target

TIMEOUT_S = 120.0
WEIGHTS = "model.safetensors"
DEFAULTS = Config()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of 8 layers, 29 tokens and width 16."""
    folder = write_target(tmp_path_factory.mktemp("models") / "target")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    return folder


@pytest.fixture
def draft(target: Path, tmp_path: Path) -> Path:
    """A draft that fits the target."""
    write_draft(tmp_path / "draft", *build_fresh_draft(target, seed=0))
    return tmp_path / "draft"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def ask(target: Path, port: int, tmp_path: Path) -> Callable[..., Plan]:
    """`plan` for that target, on a free port, with what is given changed."""

    def ask_plan(
        *flags: str, draft: Path | str = "init", model: Path = target, run: str = "run", config: Config = DEFAULTS
    ) -> Plan:
        return plan(str(model), str(draft), tmp_path / run, config, ["--port", str(port), *flags])

    return ask_plan


def edit_json(folder: Path, old: str, new: str) -> None:
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


def truncate(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / WEIGHTS)


def other_shape(folder: Path, **changes: int) -> None:
    """A draft that is sound and made for another target."""
    other = build_draft(**changes)
    write_draft(folder, other.config, other.weights())


WRONG_DRAFTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "another width": (
        lambda folder: other_shape(folder, hidden_size=8, target_hidden_size=8),
        ("target_hidden_size is 8", "wanted the target's 16", "--draft init"),
    ),
    "another vocabulary": (
        lambda folder: other_shape(folder, vocab_size=31, draft_vocab_size=31),
        ("vocab_size is 31", "wanted the target's 29", "--draft init"),
    ),
    "layers that the target has not": (
        lambda folder: other_shape(folder, aux_layers=(1, 4, 9)),
        ("eagle_aux_hidden_state_layer_ids is [1, 4, 9]", "3 distinct layers from -1 to 6", "of 8"),
    ),
    "a context below the server's": (
        lambda folder: other_shape(folder, max_position_embeddings=64),
        ("max_position_embeddings is 64", "serving context of 128 tokens", "--context-length 64"),
    ),
    "EAGLE": (
        lambda folder: edit_json(folder, "LlamaForCausalLMEagle3", "LlamaForCausalLMEagle"),
        ("architectures is ['LlamaForCausalLMEagle'], wanted ['LlamaForCausalLMEagle3']", "EAGLE, not EAGLE-3"),
    ),
    "no draft vocabulary": (
        lambda folder: edit_json(folder, '"draft_vocab_size": 29,', ""),
        ("draft_vocab_size is missing, wanted 29",),
    ),
    "a truncated file": (truncate, (WEIGHTS, "truncated: found ", "wants ")),
    "no file": (lambda folder: (folder / WEIGHTS).unlink(), (WEIGHTS, "no such file")),
    "the target's embedding table": (
        lambda folder: change_weights(folder, **{"embed_tokens.weight": torch.zeros(29, 16)}),
        ("holds embed_tokens.weight", "remove it"),
    ),
    "a tensor missing": (
        lambda folder: change_weights(folder, **{"fc.weight": None}),
        ("fc.weight is missing", "export the draft again"),
    ),
    "a tensor of another shape": (
        lambda folder: change_weights(folder, **{"fc.weight": torch.zeros(16, 32)}),
        ("fc.weight has shape [16, 32]", "wants [16, 48]"),
    ),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "c": 1}}}'),
        ("draft/tokenizer.json: 1 of 2 tokens differ", "id 1 is 'c'", "target/tokenizer.json says 'b'", "--draft init"),
    ),
    "a value that is not finite": (
        lambda folder: change_weights(folder, **{"norm.weight": torch.full((16,), torch.nan)}),
        ("norm.weight holds 16 values that are not finite", "wanted none"),
    ),
}


@pytest.mark.parametrize(("spoil", "told"), WRONG_DRAFTS.values(), ids=WRONG_DRAFTS.keys())
def test_a_draft_that_cannot_be_served_is_refused_and_no_version_is_made_of_it(
    target: Path, draft: Path, tmp_path: Path, spoil: Callable[[Path], object], told: tuple[str, ...]
):
    spoil(draft)
    paths = RunPaths(tmp_path / "run")
    paths.create()

    with pytest.raises(OnlinespecError) as caught:
        provision_draft(target, str(draft), paths, context_tokens=0, trainer=TrainerConfig())

    message = str(caught.value)
    assert message.startswith(str(draft))
    assert all(part in message for part in told), message
    assert "\n" not in message
    assert not list(paths.versions.glob("0*"))
    assert not paths.journal.exists()


@pytest.mark.parametrize(
    ("num_layers", "trainer", "told"),
    [
        (1, TrainerConfig(lora_rank=64), "trainer.lora_rank is 64, wanted at most 16 for"),
        (1, TrainerConfig(lora_rank=2, lora_targets=("w",)), "trainer.lora_targets names w, wanted one of"),
        (2, TrainerConfig(kv_mode="stable"), "trainer.kv_mode is stable, which a draft of several decoder layers"),
    ],
)
def test_a_training_that_does_not_fit_the_draft_is_refused_before_a_version_is_made(
    target: Path, draft: Path, tmp_path: Path, num_layers: int, trainer: TrainerConfig, told: str
):
    other_shape(draft, num_layers=num_layers)
    paths = RunPaths(tmp_path / "run")
    paths.create()

    with pytest.raises(ConfigError) as caught:
        provision_draft(target, str(draft), paths, context_tokens=0, trainer=trainer)

    assert str(caught.value).startswith(told)
    assert not list(paths.versions.glob("0*"))


@pytest.mark.parametrize("given", ["init", "draft"])
def test_a_draft_that_fits_becomes_version_1_and_the_server_is_told_to_load_it(ask, draft: Path, given: str):
    made = ask("--context-length", "100", draft=draft if given == "draft" else "init")

    launch = read_launch(made.paths.root)
    assert launch == made.launch
    assert (launch.version, launch.max_context_tokens, launch.num_draft_steps) == (1, 100, 3)
    flags = dict(zip(made.command, made.command[1:], strict=False))
    assert flags["--speculative-draft-model-path"] == str(made.paths.version(1)) == launch.draft
    assert (flags["--speculative-algorithm"], flags["--speculative-num-draft-tokens"]) == ("EAGLE3", "4")
    assert flags["--context-length"] == "100"
    assert made.environment["ONLINESPEC_RUN_DIR"] == str(made.paths.root)
    assert load_file(made.paths.version(1) / WEIGHTS).keys() == load_file(draft / WEIGHTS).keys()
    assert any("untrained draft" in notice for notice in made.notices) == (given == "init")


def test_a_fresh_draft_in_a_given_shape_becomes_version_1(ask, draft: Path):
    other_shape(draft, num_layers=2, intermediate_size=40)

    made = ask(draft=f"init:{draft / 'config.json'}")

    assert read_draft(made.paths.version(1))[0] == read_draft(draft)[0]
    assert load_file(made.paths.version(1) / WEIGHTS)["fc.weight"].shape == (16, 48)
    assert any("untrained draft" in notice for notice in made.notices)


def test_a_fresh_draft_in_the_shape_of_another_target_is_refused(ask, draft: Path):
    other_shape(draft, vocab_size=31, draft_vocab_size=31)

    with pytest.raises(OnlinespecError, match=r"vocab_size is 31, wanted the target's 29"):
        ask(draft=f"init:{draft}")


def test_a_run_directory_resumes_on_its_incumbent_and_says_that_the_draft_is_not_read(ask, draft: Path):
    first = ask(draft="init")
    Journal(first.paths).append(ServerStarted(time_s=1.0, version=1))

    again = ask(draft=draft)

    assert again.launch.version == 1
    assert len(list(again.paths.versions.glob("0*"))) == 1
    assert any("resuming draft version 1" in notice for notice in again.notices)


def test_a_target_that_changed_in_service_and_starts_from_its_first_files_changes_back(ask):
    first = ask(draft="init")
    journal, digest = Journal(first.paths), first.launch.target_digest
    journal.append(ServerStarted(time_s=1.0, version=1))
    journal.append(TargetChanged(time_s=2.0, from_digest=digest, to_digest="bbbb"))

    again = ask(draft="init")

    assert again.launch.version == 1
    assert state_of(journal.read()).target_digest == digest


def test_a_server_that_never_became_ready_leaves_a_version_that_the_next_start_reuses(ask, draft: Path):
    first = ask(draft=draft)

    again, other = ask(draft=draft), ask(draft="init")

    assert (again.launch.version, other.launch.version) == (1, 2)
    published = [event.version for event in Journal(first.paths).read()]
    assert published == [1, 2]


def test_a_start_on_an_ancestor_of_a_damaged_draft_is_said_and_written_down(ask):
    first = ask(draft="init")
    journal, store = Journal(first.paths), VersionStore(first.paths)
    journal.append(ServerStarted(time_s=1.0, version=1))
    second = store.publish(
        lambda folder: (folder / WEIGHTS).write_bytes(b"x"),
        parent=1,
        target_digest=first.launch.target_digest,
        provenance=store.manifest(1).provenance,
        created_s=1.0,
    )
    journal.append(Published(time_s=1.0, version=2, digest=second.digest, parent=1))
    journal.append(Promoted(time_s=2.0, version=2, from_version=1, by="gate"))
    (first.paths.version(2) / WEIGHTS).write_bytes(b"y")

    again = ask(draft="init")

    assert again.launch.version == 1
    (notice,) = (notice for notice in again.notices if "resuming" in notice)
    assert notice.startswith(f"resuming draft version 1 instead of 2, which cannot be served: {first.paths.version(2)}")
    event = journal.read()[-1]
    assert isinstance(event, RolledBack)
    assert (event.from_version, event.to_version, event.by, event.barred_digest) == (2, 1, "serve", None)
    assert "the file is damaged" in event.reason


@pytest.mark.parametrize(("flags", "is_told"), [((), True), (("--mem-fraction-static", "0.7"), False)])
def test_a_trainer_on_a_gpu_is_told_to_leave_itself_room(ask, monkeypatch, flags: tuple[str, ...], is_told: bool):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    made = ask(*flags, config=Config(trainer=TrainerConfig(device="cuda")))

    assert any("--mem-fraction-static" in notice for notice in made.notices) == is_told


def test_settings_without_an_accept_walk_are_planned_without_capture_and_said(ask):
    made = ask("--speculative-eagle-topk", "4")

    assert made.launch.capture_refused.startswith("--speculative-eagle-topk 4")
    assert f"serving without capture: {made.launch.capture_refused}" in made.notices


def test_a_port_that_is_taken_is_refused_by_its_number(ask):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]

        with pytest.raises(StartError, match=rf"127\.0\.0\.1:{number}: Address already in use; choose another --port"):
            ask("--port", str(number))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--port", "70000"], "--port is 70000, wanted 0 to 65535"),
        (["--port", "http"], "--port http: wanted a whole number"),
        (["--enable-dp-attention"], "--enable-dp-attention: DP attention is not supported"),
        (["--speculative-eagle-topk", "many"], "--speculative-eagle-topk many: wanted a whole number"),
    ],
)
def test_a_flag_that_cannot_be_served_is_refused_by_name(ask, flags: list[str], told: str):
    with pytest.raises(StartError, match=f"^{told}"):
        ask(*flags)


def test_a_model_that_is_not_there_is_refused_by_its_path(ask, tmp_path: Path):
    with pytest.raises(StartError, match=r"^model /.*/absent: no such directory.*give the path of a model directory$"):
        ask(model=tmp_path / "absent")


def test_a_directory_that_is_no_model_is_refused(ask, tmp_path: Path):
    with pytest.raises(OnlinespecError, match=r"config\.json: no such file; give a model directory"):
        ask(model=tmp_path)


def test_a_target_too_shallow_for_a_fresh_draft_is_refused(ask, tmp_path: Path):
    shallow = write_target(tmp_path / "shallow", num_hidden_layers=4)

    with pytest.raises(OnlinespecError, match=r"num_hidden_layers is 4, wanted at least 7"):
        ask(model=shallow)


def test_a_run_directory_too_deep_for_a_socket_is_refused(ask, tmp_path: Path):
    with pytest.raises(StartError, match=r"socket path .* more than the 100 .*; give a shorter --run-dir"):
        ask(run="d" * 100)

    assert not (tmp_path / ("d" * 100)).exists()


def test_a_run_directory_of_another_target_is_refused(ask, tmp_path: Path):
    first = ask(draft="init")
    Journal(first.paths).append(ServerStarted(time_s=1.0, version=1))
    other = write_target(tmp_path / "other", seed=1)

    with pytest.raises(OnlinespecError, match=r"version 1 was trained for target .*start with a new run directory"):
        ask(model=other)


def test_an_sglang_of_another_version_is_refused_with_the_one_that_is_known(
    ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    known = installed_sglang()
    metadata = tmp_path / "path" / "sglang-0.4.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.4.9\n")
    monkeypatch.syspath_prepend(metadata.parents[1])

    with pytest.raises(SiteError, match=rf"^SGLang 0\.4\.9 is installed; onlinespec .* knows .*{known}.*: install one"):
        ask()

    assert not (tmp_path / "run").exists()


def serve(*arguments: str) -> tuple[int, list[str], set[str]]:
    """Run the command line: its status, its lines on stderr, and the modules it imported.

    In a process group of its own that is killed at the end, so that a refusal that failed leaves no server behind.
    """
    command = [sys.executable, "-X", "importtime", "-m", "onlinespec.cli", "serve", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    lines = errors.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    return process.returncode, [line for line in lines if not line.startswith("import time:")], imported


def test_the_command_line_refuses_an_unknown_key_in_one_line_and_with_status_1(target: Path, tmp_path: Path):
    config = tmp_path / "mine.yaml"
    config.write_text("gate:\n  gamma: 1\n")

    status, errors, imported = serve(str(target), "--draft", "init", "--config", str(config))

    assert (status, len(errors)) == (1, 1)
    assert errors[0].startswith(f"error: {config}: unknown key gate.gamma")
    assert "onlinespec.config" in imported
    assert "sglang" not in imported


def test_the_command_line_refuses_a_draft_without_importing_sglang(
    target: Path, draft: Path, tmp_path: Path, port: int
):
    change_weights(draft, **{"embed_tokens.weight": torch.zeros(29, 16)})

    status, errors, imported = serve(
        str(target), "--draft", str(draft), "--run-dir", str(tmp_path / "run"), "--port", str(port)
    )

    assert (status, len(errors)) == (1, 1)
    assert errors[0].startswith(f"error: {draft / WEIGHTS}: holds embed_tokens.weight")
    assert "onlinespec.serve" in imported
    assert not {name for name in imported if name.partition(".")[0] == "sglang"}


def test_where_asked_sglang_prepares_depth_zero_beside_the_depth_wanted_and_otherwise_nothing(ask):
    floor = Config(floor=FloorConfig(enabled=True))

    asked, other = ask("--speculative-num-steps", "5", config=floor), ask(run="other")

    path = asked.command[asked.command.index("--speculative-adaptive-config") + 1]
    assert json.loads(Path(path).read_text()) == {"1": {"candidate_steps": [0, 5]}}
    assert "--speculative-adaptive" in asked.command
    assert asked.launch.depth_refused == ""
    assert "--speculative-adaptive" not in other.command
    assert other.launch.depth_refused == "floor.enabled is false"


@pytest.mark.parametrize(
    ("flag", "notice"),
    [
        ("--enable-lora", "serving at a fixed draft depth: --enable-lora"),
        ("--speculative-adaptive", "serving without capture: --speculative-adaptive"),
        ("--speculative-eagle-topk=4", "serving without capture: --speculative-eagle-topk 4"),
    ],
)
def test_where_the_depth_cannot_change_one_notice_names_the_setting(ask, flag: str, notice: str):
    asked = ask(flag, config=Config(floor=FloorConfig(enabled=True)))

    assert [line for line in asked.notices if flag.split("=")[0] in line] == [
        line for line in asked.notices if line.startswith(notice)
    ]
    assert sum(line.startswith(notice) for line in asked.notices) == 1
    assert "--speculative-adaptive-config" not in asked.command
    assert asked.launch.depth_refused.startswith(flag.split("=")[0])
