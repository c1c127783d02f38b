"""Real sockets: what is lost is counted, what is asked is answered once, and the server never waits."""

import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zmq

from onlinespec.errors import StartError, WireError
from onlinespec.paths import RunPaths
from onlinespec.wire.frames import arrays_of, header_of
from onlinespec.wire.messages import (
    Ack,
    GetHello,
    GetStatus,
    Heartbeat,
    RequestEnded,
    Rows,
    SetCapture,
    Status,
    Swap,
    decode_reply,
    encode,
    encode_batch,
)
from onlinespec.wire.sockets import ControlClient, ControlServer, SampleReceiver, SampleSender, check_endpoint

PATIENCE_S = 20.0
STATUS = Status(4, 1, True, "closed", "", {"rows": 2})
# A sidecar that takes one message, says so and then reads no more.
LISTENER = """
import sys, time
from onlinespec.wire.sockets import SampleReceiver
receiver = SampleReceiver(sys.argv[1])
print(receiver.receive(20)[0].request, flush=True)
time.sleep(60)
"""


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path)
    paths.create()
    return paths


def ended(number: int) -> RequestEnded:
    return RequestEnded(number, "stop", 1, 1, 2, 0.0)


def rows_message(number: int) -> tuple[Rows, list[np.ndarray]]:
    arrays = [np.full((2, 3), number, np.float32), np.empty((0, 3), np.int32), np.full(2, number, np.int32)]
    return Rows([], [header_of(array) for array in arrays]), arrays


def receive_until(receiver: SampleReceiver, is_last) -> list:
    """Messages up to and with the first that `is_last` says yes to."""
    messages, deadline_s = [], time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        received = receiver.receive(0.1)
        if received is not None:
            messages.append(received[0])
            if is_last(received[0]):
                return messages
    raise AssertionError(f"the last of {len(messages)} messages was not the one waited for")


def test_without_a_receiver_the_queue_fills_to_its_budget_and_the_rest_is_dropped_and_counted(paths: RunPaths):
    message, frame = ended(1), np.zeros(100, np.float32)
    num_bytes = len(encode(message)) + frame.nbytes
    sender = SampleSender(paths.samples_endpoint, budget_bytes=5 * num_bytes + 1, version=lambda: 1)

    kept = [sender.offer(message, [frame], num_rows=3) for _ in range(200)]

    assert kept == [True] * 5 + [False] * 195
    assert sender.counters == Counter(
        rows=15,
        bytes=5 * num_bytes,
        dropped_messages=195,
        dropped_rows=195 * 3,
        dropped_bytes=195 * num_bytes,
    )


def test_a_receiver_gets_every_message_and_frame_in_order(paths: RunPaths):
    sender = SampleSender(paths.samples_endpoint, budget_bytes=2**20, version=lambda: 1)
    receiver = SampleReceiver(paths.samples_endpoint)
    offered = [rows_message(number) for number in range(60)]

    kept = [sender.offer(message, arrays, num_rows=2) for message, arrays in offered]
    received = []
    while len(received) < len(offered):
        message, frames = receiver.receive(PATIENCE_S)
        if isinstance(message, Rows):
            received.append([array.copy() for array in arrays_of(message.frames, frames)])
    receiver.close()

    assert all(kept)
    assert sender.counters["rows"] == 120
    for (_, arrays), found in zip(offered, received, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(arrays, found, strict=True))


@pytest.mark.parametrize("frame_bytes", [1000, 600_000, 3_000_000])
def test_what_waits_together_travels_together_and_comes_out_as_it_went_in(
    paths: RunPaths, monkeypatch, frame_bytes: int
):
    sender = SampleSender(paths.samples_endpoint, budget_bytes=2**26, version=lambda: 1)
    sent, send = [], sender._send
    monkeypatch.setattr(sender, "_send", lambda parts: (sent.append(len(parts)), send(parts))[1])
    wanted = [(number, bytes([number]) * frame_bytes, b"x" * number) for number in range(10)]

    for number, *frames in wanted:
        sender.offer(ended(number), frames)
    receiver = SampleReceiver(paths.samples_endpoint)
    found = []
    while len(found) < len(wanted):
        message, frames = receiver.receive(PATIENCE_S)
        if isinstance(message, RequestEnded):
            found.append((message.request, *map(bytes, frames)))
    receiver.close()

    assert found == wanted
    if frame_bytes == 1000:
        assert sent.count(2) < len(wanted)
    if frame_bytes == 3_000_000:
        assert sent.count(3) == len(wanted), "each alone, with its two frames as they are"


def test_room_in_the_queue_comes_back_once_a_receiver_reads(paths: RunPaths):
    num_bytes = len(encode(ended(1)))
    sender = SampleSender(paths.samples_endpoint, budget_bytes=num_bytes, version=lambda: 1)
    assert sender.offer(ended(1))
    assert not sender.offer(ended(2))

    receiver = SampleReceiver(paths.samples_endpoint)
    receive_until(receiver, lambda message: message == ended(1))
    deadline_s = time.monotonic() + PATIENCE_S
    while not sender.offer(ended(3)) and time.monotonic() < deadline_s:
        time.sleep(0.01)

    assert receive_until(receiver, lambda message: message == ended(3))
    receiver.close()


def test_a_receiver_that_was_killed_is_followed_by_one_that_gets_what_comes_later(paths: RunPaths):
    sender = SampleSender(paths.samples_endpoint, budget_bytes=2**20, version=lambda: 1)
    command = [sys.executable, "-c", LISTENER, paths.samples_endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        sender.offer(ended(1))
        assert first.stdout is not None
        heard = first.stdout.readline()
        first.send_signal(signal.SIGKILL)
    for number in range(2, 50):
        assert sender.offer(ended(number))

    receiver = SampleReceiver(paths.samples_endpoint)
    sender.offer(ended(50))
    later = [m.request for m in receive_until(receiver, lambda m: m == ended(50)) if isinstance(m, RequestEnded)]
    receiver.close()

    assert heard.strip() == "1"
    assert later == sorted(set(later))
    assert len(later) > 30, "more was lost than one ZeroMQ queue holds"


class Late:
    """Frames whose device takes its time; None where it fails."""

    def __init__(self, frames: list[np.ndarray] | None):
        self.num_bytes = 4096
        self.threads: list[str] = []
        self._frames = frames

    def __call__(self) -> list[np.ndarray] | None:
        self.threads.append(threading.current_thread().name)
        return self._frames


def test_late_frames_are_made_once_on_the_senders_thread_and_count_before_by_what_they_promise(paths: RunPaths):
    message, arrays = rows_message(5)
    late, lost = Late(arrays), Late(None)
    num_bytes = len(encode(message)) + late.num_bytes
    sender = SampleSender(paths.samples_endpoint, budget_bytes=2 * num_bytes, version=lambda: 1)

    kept = [sender.offer(message, frames, num_rows=2) for frames in (late, lost, Late(arrays))]
    receiver = SampleReceiver(paths.samples_endpoint)
    received, frames = receiver.receive(PATIENCE_S)
    found = [array.copy() for array in arrays_of(received.frames, frames)]
    deadline_s = time.monotonic() + PATIENCE_S
    while not sender.offer(ended(1), [bytes(num_bytes)]) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    receive_until(receiver, lambda message: message == ended(1))
    receiver.close()

    assert kept == [True, True, False]
    assert all(np.array_equal(a, b) for a, b in zip(arrays, found, strict=True))
    assert late.threads == lost.threads == ["onlinespec-samples"]
    assert sender.counters["dropped_messages"] >= 2, "one had no room, one could not be made"


def test_a_message_that_cannot_be_sent_is_lost_counted_and_the_thread_goes_on(paths: RunPaths):
    faults = []

    def guard(send):
        try:
            return send()
        except TypeError as error:
            faults.append(error)
            return None

    sender = SampleSender(paths.samples_endpoint, budget_bytes=2**20, version=lambda: 1, guard=guard)
    broken = Late([object()])

    sender.offer(ended(0))
    sender.offer(ended(1), broken)
    sender.offer(ended(2), [b"frame"])
    receiver = SampleReceiver(paths.samples_endpoint)
    received = receive_until(receiver, lambda message: message == ended(2))
    receiver.close()

    assert [message.request for message in received if isinstance(message, RequestEnded)] == [0, 2]
    assert 1 <= len(faults) <= 3, "in its batch, behind what was good in that, and alone"
    assert sender.counters["dropped_messages"] == 1


def test_a_heartbeat_tells_the_counters_and_the_version_in_service(paths: RunPaths):
    sender = SampleSender(paths.samples_endpoint, budget_bytes=len(encode(ended(1))), version=lambda: 9)
    sender.offer(ended(1), num_rows=2)
    sender.offer(ended(2), [b"12345"], num_rows=3)

    receiver = SampleReceiver(paths.samples_endpoint)
    beat = receive_until(receiver, lambda message: isinstance(message, Heartbeat))[-1]
    receiver.close()

    assert beat == Heartbeat(9, dict(sender.counters))
    assert (beat.counters["rows"], beat.counters["dropped_rows"]) == (2, 3)


def test_heartbeats_come_while_the_queue_is_never_empty(paths: RunPaths):
    frame = bytes(2**16)  # the kernel's buffers hold few of these, and would hold thousands of small ones
    sender = SampleSender(paths.samples_endpoint, budget_bytes=40 * len(frame), version=lambda: 1)
    receiver = SampleReceiver(paths.samples_endpoint)

    def fill(message: object) -> bool:
        while sender.offer(ended(1), [frame]):
            pass
        time.sleep(0.02)
        return isinstance(message, Heartbeat)

    fill(None)
    beat = receive_until(receiver, fill)[-1]
    receiver.close()

    assert beat.counters["dropped_messages"] > 0


def test_receiving_gives_up_when_nothing_comes_in_time(paths: RunPaths):
    receiver = SampleReceiver(paths.samples_endpoint)

    received = receiver.receive(0.05)
    receiver.close()

    assert received is None


def test_a_damaged_message_is_a_wire_error_and_the_next_one_is_received(paths: RunPaths):
    receiver = SampleReceiver(paths.samples_endpoint)
    with zmq.Context.instance().socket(zmq.PUSH) as raw:
        raw.bind(paths.samples_endpoint)
        raw.send(b"junk")
        raw.send_multipart([encode_batch([(encode(ended(1)), [3]), (encode(ended(1)), [])]), b"four"])
        raw.send_multipart([encode_batch([(b"junk", []), (encode(ended(2)), [5])]), b"frame"])

        for damage in (
            "4 bytes are no batch of sample messages",
            "a batch names 1 frames of 3 bytes, and these came: 4",
            "4 bytes are no sample message",
        ):
            with pytest.raises(WireError, match=damage):
                receiver.receive(PATIENCE_S)
        message, frames = receiver.receive(PATIENCE_S)
        receiver.close()

    assert message == ended(2)
    assert [bytes(frame) for frame in frames] == [b"frame"]


def test_each_request_has_one_answer_which_reaches_the_client_that_asked(paths: RunPaths):
    seen: Counter[int] = Counter()

    def answer(request: object) -> Ack:
        assert isinstance(request, Swap)
        seen[request.version] += 1
        return Ack(True, version=request.version)

    ControlServer(paths.control_endpoint, answer)
    answers: dict[int, int] = {}

    def ask(first: int) -> None:
        client = ControlClient(paths.control_endpoint)
        for version in range(first, first + 10):
            answers[version] = client.acknowledged(Swap(version, "path", "digest")).version

    threads = [threading.Thread(target=ask, args=(10 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)

    assert answers == {version: version for version in range(60)}
    assert seen == Counter(range(60))


def test_a_request_that_does_not_decode_is_answered_no_and_the_next_is_served(paths: RunPaths):
    ControlServer(paths.control_endpoint, lambda request: STATUS)
    with zmq.Context.instance().socket(zmq.REQ) as raw:
        raw.connect(paths.control_endpoint)
        raw.send(b"junk")
        assert raw.poll(int(PATIENCE_S * 1000))
        refusal = decode_reply(raw.recv())

    reply = ControlClient(paths.control_endpoint).request(GetStatus())

    assert isinstance(refusal, Ack)
    assert (refusal.is_ok, refusal.message[:29]) == (False, "4 bytes are no control reques")
    assert reply == STATUS


def test_a_client_gives_up_when_nobody_listens_and_names_the_socket(paths: RunPaths):
    client = ControlClient(paths.control_endpoint)

    with pytest.raises(WireError, match=r"no answer from the server at ipc://.*/sockets/control within 0 s"):
        client.request(GetHello(), timeout_s=0.1)


def test_a_client_that_gave_up_does_not_take_the_late_answer_for_the_next_one(paths: RunPaths):
    release = threading.Event()

    def answer(request: object) -> Ack:
        if isinstance(request, SetCapture):
            release.wait(PATIENCE_S)
            return Ack(True, "late")
        return Ack(True, "prompt")

    ControlServer(paths.control_endpoint, answer)
    client = ControlClient(paths.control_endpoint)
    with pytest.raises(WireError):
        client.request(SetCapture(True), timeout_s=0.2)
    release.set()

    assert client.acknowledged(Swap(1, "path", "digest")).message == "prompt"


def test_an_answer_of_another_kind_than_an_ack_is_a_wire_error(paths: RunPaths):
    ControlServer(paths.control_endpoint, lambda request: STATUS)

    with pytest.raises(WireError, match="answered Status, wanted an Ack"):
        ControlClient(paths.control_endpoint).acknowledged(SetCapture(True))


@pytest.mark.parametrize("name", ["r" * 120, "\N{SNOWMAN}" * 40])
def test_a_socket_path_too_long_for_unix_is_refused_with_its_length(name: str):
    endpoint = RunPaths(f"/tmp/{name}").samples_endpoint

    with pytest.raises(
        StartError, match=r"socket path /tmp/.* has 1\d\d bytes, more than .*; give a shorter --run-dir"
    ):
        check_endpoint(endpoint)


def test_the_longest_path_that_is_allowed_can_be_bound(tmp_path: Path):
    path = f"{tmp_path}/{'s' * (100 - len(str(tmp_path)) - 1)}"
    endpoint = f"ipc://{path}"

    check_endpoint(endpoint)
    with zmq.Context.instance().socket(zmq.PULL) as raw:
        raw.bind(endpoint)
        is_there = Path(path).is_socket()

    assert is_there


def test_only_the_owner_can_enter_the_run_directory_and_its_sockets(tmp_path: Path):
    paths = RunPaths(tmp_path / "run")

    paths.create()

    for folder in (paths.root, paths.sockets, paths.versions):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
