"""The sidecar's part: nothing is written unasked, a request is followed, and no fault of the disk is raised."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from onlinespec.record.live import LiveRecording, Request, post_request, read_request
from onlinespec.record.manifest import RowFacts
from onlinespec.record.reader import Recording
from tests.draft.tiny import build_sample

FACTS = RowFacts(target_digest="aa", hidden_size=16, aux_layers=(2, 4, 5), teacher_top_k=4)
PID = 77


@pytest.fixture
def request_path(tmp_path: Path) -> Path:
    return tmp_path / "record.json"


@contextmanager
def small_files_only() -> Iterator[None]:
    """The kernel refuses to let a file grow beyond 6_000 bytes. No longer than needed: pytest writes files too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def build_live(path: Path, shard_bytes: int = 10_000) -> LiveRecording:
    return LiveRecording(path, PID, FACTS, shard_bytes)


def ask(path: Path, out: Path, max_bytes: int = 10**6, serve_pid: int = PID) -> Request:
    request = Request(directory=str(out), max_bytes=max_bytes, serve_pid=serve_pid)
    post_request(path, request)
    return request


def feed(live: LiveRecording, numbers: range) -> None:
    for number in numbers:
        live.add(build_sample(number))


def test_nothing_is_written_unasked(tmp_path: Path, request_path: Path):
    live = build_live(request_path)

    live.poll(0.0)
    feed(live, range(5))
    live.close()

    assert list(tmp_path.iterdir()) == []
    assert live.progress is None


def test_a_recording_holds_what_came_between_request_and_stop(tmp_path: Path, request_path: Path):
    live = build_live(request_path)
    feed(live, range(2))
    ask(request_path, tmp_path / "r")

    live.poll(0.0)
    feed(live, range(2, 5))
    live.poll(1.0)
    running = live.progress
    request_path.unlink()
    live.poll(2.0)
    feed(live, range(5, 9))

    assert [sample.request for sample in Recording(tmp_path / "r")] == [2, 3, 4]
    assert (running.state, running.num_samples) == ("running", 3)
    assert (live.progress.state, live.progress.num_samples) == ("stopped", 3)


def test_the_bound_ends_a_recording_and_takes_the_request_away(tmp_path: Path, request_path: Path):
    live = build_live(request_path)
    ask(request_path, tmp_path / "r", max_bytes=20_000)

    live.poll(0.0)
    feed(live, range(40))

    assert live.progress.state == "full"
    assert not request_path.exists()
    assert 3 < len(Recording(tmp_path / "r")) == live.progress.num_samples < 40


def test_a_new_sidecar_goes_on_with_the_request(tmp_path: Path, request_path: Path):
    ask(request_path, tmp_path / "r")
    for number in (1, 2):
        live = build_live(request_path)
        live.poll(0.0)
        feed(live, range(number, number + 1))
        live.close()

    assert request_path.exists()
    assert [sample.request for sample in Recording(tmp_path / "r")] == [1, 2]


def test_a_request_to_an_earlier_server_is_dropped_and_writes_nothing(tmp_path: Path, request_path: Path):
    ask(request_path, tmp_path / "r", serve_pid=PID + 1)
    live = build_live(request_path)

    live.poll(0.0)
    feed(live, range(3))

    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_ends_the_recording_with_a_reason_and_the_sidecar_goes_on(
    tmp_path: Path, request_path: Path
):
    live = build_live(request_path)
    ask(request_path, tmp_path / "r")

    with small_files_only():
        live.poll(0.0)
        feed(live, range(20))
        live.poll(1.0)

    assert live.progress.state == "failed"
    assert "File too large" in live.progress.reason
    assert not request_path.exists()


def test_a_directory_that_cannot_be_made_is_a_reason_too(tmp_path: Path, request_path: Path):
    (tmp_path / "file").write_text("")
    live = build_live(request_path)
    ask(request_path, tmp_path / "file" / "r")

    live.poll(0.0)
    feed(live, range(2))

    assert live.progress.state == "failed"
    assert "Not a directory" in live.progress.reason


def test_a_recording_of_another_target_is_not_added_to(tmp_path: Path, request_path: Path):
    other = LiveRecording(request_path, PID, msgspec.structs.replace(FACTS, target_digest="bb"), 10_000)
    for live in (other, build_live(request_path)):
        ask(request_path, tmp_path / "r")
        live.poll(0.0)
        feed(live, range(2))
        request_path.unlink(missing_ok=True)
        live.poll(1.0)

    assert live.progress.state == "failed"
    assert "target_digest" in live.progress.reason
    assert len(Recording(tmp_path / "r")) == 2


def test_a_damaged_request_ends_what_runs_and_is_removed(tmp_path: Path, request_path: Path):
    live = build_live(request_path)
    ask(request_path, tmp_path / "r")
    live.poll(0.0)
    feed(live, range(2))

    request_path.write_text("{")
    live.poll(1.0)
    feed(live, range(2, 4))

    assert live.progress.state == "failed"
    assert "no request to record" in live.progress.reason
    assert not request_path.exists()
    assert len(Recording(tmp_path / "r")) == 2


def test_a_second_request_is_refused_while_one_stands(tmp_path: Path, request_path: Path):
    first = ask(request_path, tmp_path / "r")

    with pytest.raises(FileExistsError):
        ask(request_path, tmp_path / "s")

    assert read_request(request_path) == first
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert request_path.stat().st_mode & 0o777 == 0o600
