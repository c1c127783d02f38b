"""Offline training: the online path, deterministic, resumable after kill -9, and refusing what does not fit."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.config import read_target
from onlinespec.draft.fresh import build_fresh_draft, read_embedding
from onlinespec.draft.header import check_draft, digest
from onlinespec.draft.model import Draft
from onlinespec.draft.walk import walk
from onlinespec.errors import OnlinespecError
from onlinespec.offline.stream import Stream, is_evaluated
from onlinespec.offline.train import Training
from onlinespec.record.reader import Recording
from onlinespec.trainer.learner import Learner
from tests.draft.tiny import build_draft, write_target
from tests.offline.small import CONFIG, build_plan, build_samples, run, write_recording

TIMEOUT_S = 120.0


def losses(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_it_is_the_learner_fed_in_recorded_order_on_the_recordings_clock(tmp_path: Path):
    plan = build_plan(tmp_path, epochs=2)
    kept = [sample for sample in build_samples(30) if not is_evaluated(sample, 0.2)]
    learner = Learner(CONFIG, *build_fresh_draft(plan.target, 3), read_embedding(plan.target).float())
    expected = []
    for epoch in range(2):
        for sample in kept:
            number, ended_s = epoch * 30 + sample.request, sample.ended_s + epoch * 290.0
            learner.add(replace(sample, request=number, ended_s=ended_s), ended_s)
            while (result := learner.step(ended_s)) is not None:
                expected.append(result.loss)

    _, seen = run(plan)

    assert [line["loss"] for line in losses(plan.out)] == expected
    assert 10 < len(kept) < 30
    assert [now.place for now in seen[:3]] == [sample.request + 1 for sample in kept[:3]]
    assert (seen[-1].place, seen[-1].num_places) == (60, 60)
    for name, tensor in read_draft(plan.out / "draft")[1].items():
        assert torch.equal(tensor, learner.trainer.weights()[name]), name


def test_what_is_evaluated_is_never_trained_on_and_no_answer_of_it_is(tmp_path: Path):
    samples = build_samples(30)
    evaluated = [sample for sample in samples if is_evaluated(sample, 0.2)]
    trained = next(sample for sample in samples if not is_evaluated(sample, 0.2))
    # The answer of one that is trained on, asked again by somebody else.
    repeat = replace(trained, group=evaluated[0].group, num_prompt_tokens=trained.num_prompt_tokens)
    target = write_target(tmp_path / "target")
    write_recording(tmp_path / "recording", target, [*samples, repeat])

    training, _ = run(build_plan(tmp_path))

    found = training.survey
    assert [sample.request for sample in found.evaluation] == [sample.request for sample in evaluated]
    assert (found.num_repeats, found.num_training) == (1, 30 - len(evaluated))
    groups = {sample.group for sample in found.evaluation}
    assert not groups & {sample.group for sample in samples if sample not in evaluated}


def test_the_accept_length_is_the_walk_of_the_draft_that_is_written(tmp_path: Path):
    plan = build_plan(tmp_path, epochs=4, num_draft_steps=2)

    training, _ = run(plan)

    draft, embed = Draft(*read_draft(plan.out / "draft")), read_embedding(plan.target).float()
    steps = [walk(draft, sample, embed, 2) for sample in training.survey.evaluation]
    expected = sum(sum(step.num_committed) for step in steps) / sum(len(step) for step in steps)
    evaluations = report(plan.out)["evaluation"]["accept_lengths"]
    assert evaluations[-1]["accept_length"] == pytest.approx(expected)
    assert evaluations[-1]["step"] == report(plan.out)["steps"] == losses(plan.out)[-1]["step"]
    assert [entry["step"] for entry in evaluations[:3]] == [0, 10, 20]
    assert expected > evaluations[0]["accept_length"] + 0.3


def test_the_draft_fits_its_target_and_the_report_says_where_it_came_from(tmp_path: Path):
    plan = build_plan(tmp_path, command=("onlinespec", "train"))

    run(plan)

    found = report(plan.out)
    assert check_draft(plan.out / "draft", read_target(plan.target)).hidden_size == 16
    assert found["draft"]["digest"] == digest(plan.out / "draft")
    assert found["recording"]["digest"] == Recording(plan.recording).digest
    assert found["recording"]["tenants"] == ["tenant"]
    assert found["losses"] == [line["loss"] for line in losses(plan.out)]
    assert found["config"] == msgspec.to_builtins(CONFIG) | {"trainer": found["config"]["trainer"]}
    assert (found["seed"], found["command"]) == (3, ["onlinespec", "train"])
    assert {path.name for path in plan.out.iterdir()} == {"draft", "report.json", "losses.jsonl", "checkpoint.pt"}


def test_a_given_draft_is_trained_on_from_where_it_stands(tmp_path: Path):
    first = build_plan(tmp_path)
    run(first)

    run(replace(first, draft=str(first.out / "draft"), out=tmp_path / "more"))

    before, after = report(first.out), report(tmp_path / "more")
    assert after["started_from"]["digest"] == before["draft"]["digest"]
    start = after["evaluation"]["accept_lengths"][0]["accept_length"]
    assert start == before["evaluation"]["accept_lengths"][-1]["accept_length"]


@pytest.mark.parametrize("stop_after", [1, 25])
def test_a_stopped_and_resumed_run_gives_the_losses_of_an_unbroken_one(tmp_path: Path, stop_after: int):
    plan = build_plan(tmp_path, epochs=2)
    run(plan)
    broken = replace(plan, out=tmp_path / "broken")
    seen = []
    assert not Training(broken).run(seen.append, lambda: len(seen) == stop_after)

    run(replace(broken, is_resumed=True))

    assert len(seen) == stop_after
    assert losses(broken.out) == losses(plan.out)
    assert report(broken.out)["evaluation"] == report(plan.out)["evaluation"]
    assert report(broken.out)["draft"]["digest"] == report(plan.out)["draft"]["digest"]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "onlinespec.cli", "train", *words]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_a_run_that_was_killed_and_resumed_gives_the_losses_of_an_unbroken_one(tmp_path: Path):
    plan = build_plan(tmp_path, num_samples=60)
    config = tmp_path / "config.yaml"
    config.write_text("buffer: {recent_samples: 6, reservoir_samples: 8}\ntrainer: {unroll_steps: 2, seed: 3}\n")
    words = ["--recording", str(plan.recording), "--target", str(plan.target), "--draft", "init"]
    words += ["--config", str(config), "--epochs", "8", "--eval-frac", "0.2", "--eval-steps", "50"]
    unbroken = subprocess.Popen(command(*words, "--out", str(tmp_path / "unbroken")), env=environment())
    often = [*words, "--out", str(tmp_path / "broken"), "--set", "trainer.checkpoint_s=0.2"]

    killed = subprocess.Popen(command(*often), env=environment())
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "broken" / "checkpoint.pt").exists() and time.monotonic() < deadline_s:
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "broken" / "report.json").exists()
    torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)
    resumed = subprocess.run(
        command(*often, "--resume"), env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S
    )

    assert resumed.returncode == 0, resumed.stderr
    assert "resuming, last evaluated at step" in resumed.stderr
    assert unbroken.wait(TIMEOUT_S) == 0
    assert len(losses(tmp_path / "unbroken")) > 150
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    evaluations = [report(tmp_path / name)["evaluation"] for name in ("broken", "unbroken")]
    assert evaluations[0] == evaluations[1]


def test_sigterm_ends_a_run_with_a_checkpoint_and_its_own_exit_code(tmp_path: Path):
    plan = build_plan(tmp_path)
    words = ["--recording", str(plan.recording), "--target", str(plan.target), "--draft", "init", "--epochs", "100000"]
    running = subprocess.Popen(command(*words, "--out", str(plan.out)), env=environment())
    log = plan.out / "losses.jsonl"
    try:
        while not (log.exists() and log.stat().st_size > 1000):
            assert running.poll() is None
            time.sleep(0.02)

        running.terminate()

        assert running.wait(TIMEOUT_S) == 130
    finally:
        running.kill()
    assert (plan.out / "checkpoint.pt").exists()
    assert not (plan.out / "draft").exists()


def test_resuming_with_nothing_saved_starts_from_the_start(tmp_path: Path):
    plan = build_plan(tmp_path)
    plan.out.mkdir()
    (plan.out / "losses.jsonl").write_text('{"step": 1, "loss": 1.0}\n')

    training, _ = run(replace(plan, is_resumed=True))

    assert not training.has_resumed
    assert losses(plan.out)[0]["rows"] > 0


def test_a_finished_run_resumes_with_more_epochs(tmp_path: Path):
    run(build_plan(tmp_path, epochs=3, out=tmp_path / "three"))
    run(build_plan(tmp_path, epochs=1))

    run(build_plan(tmp_path, epochs=3, is_resumed=True))

    assert losses(tmp_path / "out") == losses(tmp_path / "three")


def refused(plan) -> str:
    with pytest.raises(OnlinespecError) as caught:
        run(plan)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_second_training_into_the_same_directory_is_refused(tmp_path: Path):
    run(build_plan(tmp_path))

    assert re.search(r"losses\.jsonl: exists already; go on with --resume", refused(build_plan(tmp_path)))


def test_resuming_with_another_config_recording_or_draft_is_refused_by_its_name(tmp_path: Path):
    plan = build_plan(tmp_path)
    run(plan)
    again = replace(plan, is_resumed=True)
    other = msgspec.structs.replace(CONFIG, trainer=msgspec.structs.replace(CONFIG.trainer, seed=4))
    longer = write_recording(tmp_path / "longer", plan.target, build_samples(31))

    assert "was made with trainer.seed 3, this run has 4" in refused(replace(again, config=other))
    assert "was made with --recording" in refused(replace(again, recording=longer))
    assert "was made with --draft init" in refused(replace(again, draft=str(plan.out / "draft")))
    assert "was made with --eval-frac 0.2, this run has 0.3" in refused(replace(again, eval_frac=0.3))


def test_a_target_or_draft_the_recording_was_not_made_for_is_refused(tmp_path: Path):
    plan = build_plan(tmp_path)
    other = write_target(tmp_path / "other", seed=1)
    pairs = {"aux_layers": (1, 2, 3)}
    elsewhere = write_recording(tmp_path / "elsewhere", plan.target, build_samples(4), **pairs)
    deep = build_draft(aux_layers=(0, 3, 6))
    write_draft(tmp_path / "deep", deep.config, deep.weights())

    assert "its rows have target_digest" in refused(replace(plan, target=other))
    assert "its rows have aux_layers [1, 2, 3], wanted [2, 4, 5]" in refused(replace(plan, recording=elsewhere))
    assert "its rows have aux_layers [2, 4, 5], wanted [1, 4, 7]" in refused(
        replace(plan, draft=str(tmp_path / "deep"))
    )


def test_a_damaged_shard_is_found_before_the_first_step(tmp_path: Path):
    plan = build_plan(tmp_path)
    shard = sorted(plan.recording.glob("shard-*"))[-1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)

    assert f"{shard.name}: its digest is" in refused(plan)
    assert not plan.out.exists()


def test_nothing_to_train_on_is_said(tmp_path: Path):
    target = write_target(tmp_path / "target")
    write_recording(tmp_path / "recording", target, [])
    off = msgspec.structs.replace(CONFIG, trainer=msgspec.structs.replace(CONFIG.trainer, enabled=False))

    assert "none of its 0 samples is left to train on" in refused(build_plan(tmp_path))
    assert "trainer.enabled is false" in refused(build_plan(tmp_path, config=off))


def test_samples_are_found_by_place_as_they_come_in_order(tmp_path: Path):
    plan = build_plan(tmp_path)
    stream = Stream(Recording(plan.recording), 0.2, 2, 290.0)

    for sample in stream.since(0):
        found = stream[sample.request]
        assert (found.request, found.ended_s) == (sample.request, sample.ended_s)
        assert torch.equal(found.tokens_T, sample.tokens_T)

    assert [sample.request for sample in stream.since(37)] == [s.request for s in stream.since(0) if s.request >= 37]
