"""The two sockets: samples (PUSH -> PULL, may be lost) and control (REQ -> ROUTER, acknowledged).

The server binds both under the run directory's `sockets/`, which only its owner can enter; the sidecar
and the commands connect. Nothing here blocks the server: the sender owns a queue bounded in bytes, since
a ZeroMQ high-water mark counts messages and bounds no memory.

Messages of some tens of milliseconds travel in one batch, small frames joined. Each call into ZeroMQ gives the
interpreter away and wants it back from the scheduler's thread, which is always busy and pays for each of these turns.
"""

import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import zmq

from onlinespec.errors import StartError, WireError
from onlinespec.wire.messages import (
    Ack,
    ControlReply,
    ControlRequest,
    Heartbeat,
    Hello,
    SampleMessage,
    Status,
    decode_reply,
    decode_request,
    decode_sample,
    encode,
    encode_batch,
    messages_of,
)

_SEND_HWM = 8
_LINGER_S = 0.05
_BATCH_MESSAGES = 256
_BATCH_BYTES = 2**22
"""of a batch of several messages; what is larger goes alone, its frames as they are"""
_JOIN_BYTES = 2**20
_POLL_MS = 100
_HEARTBEAT_S = 1.0
_MAX_IPC_PATH = 100


def check_endpoint(endpoint: str) -> None:
    """Raises: StartError where the path is longer than a Unix socket's may be."""
    path = endpoint.removeprefix("ipc://")
    num_bytes = len(os.fsencode(path))
    if num_bytes > _MAX_IPC_PATH:
        raise StartError(
            f"socket path {path} has {num_bytes} bytes, more than the {_MAX_IPC_PATH} a Unix socket may have;"
            " give a shorter --run-dir"
        )


class LateFrames(Protocol):
    """Frames that are made on the sender's thread, where waiting for a device costs the server nothing."""

    num_bytes: int

    def __call__(self) -> Sequence[Any] | None:
        """None where they cannot be made: the message is dropped."""


def _plainly(send: Callable[[], bool]) -> bool:
    return send()


class SampleSender:
    """Server side of the samples stream. guard: calls a sending; None where it raised. A message that cannot be sent
    alone either is lost, and the thread goes on.

    `offer` never blocks: it queues, or drops and counts. One thread sends. With no sidecar the queue fills
    to its budget and stays there; memory is bounded by `budget_bytes` plus the few batches ZeroMQ holds.
    """

    def __init__(
        self,
        endpoint: str,
        budget_bytes: int,
        version: Callable[[], int],
        guard: Callable[[Callable[[], bool]], bool | None] = _plainly,
    ):
        self.counters: Counter[str] = Counter()
        self._guard = guard
        self._budget_bytes = budget_bytes
        self._version = version
        self._queue: deque[tuple[bytes, Sequence[Any] | LateFrames, int]] = deque()
        self._queued_bytes = 0
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._beat_s = time.monotonic()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, _SEND_HWM)
        self._socket.setsockopt(zmq.SNDTIMEO, _POLL_MS)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        threading.Thread(target=self._run, name="onlinespec-samples", daemon=True).start()

    def offer(self, message: msgspec.Struct, frames: Sequence[Any] | LateFrames = (), num_rows: int = 0) -> bool:
        """Queue one message with its frames (C-contiguous buffers); False where the budget dropped it."""
        head = encode(message)
        if isinstance(frames, Sequence):
            num_bytes = len(head) + sum(memoryview(frame).nbytes for frame in frames)
        else:
            num_bytes = len(head) + frames.num_bytes
        with self._lock:
            fits = self._queued_bytes + num_bytes <= self._budget_bytes
            if fits:
                self._queue.append((head, frames, num_bytes))
                self._queued_bytes += num_bytes
        if fits:
            self.counters["rows"] += num_rows
            self.counters["bytes"] += num_bytes
            self._wake.set()
        else:
            self.drop(num_rows, num_bytes)
        return fits

    def drop(self, num_rows: int, num_bytes: int) -> None:
        """Count a message that is not sent."""
        self.counters["dropped_messages"] += 1
        self.counters["dropped_rows"] += num_rows
        self.counters["dropped_bytes"] += num_bytes

    def _run(self) -> None:
        while True:
            if self._wake.wait(_HEARTBEAT_S):
                time.sleep(_LINGER_S)
            self._wake.clear()
            while self._queue:
                if self._guard(self._send_batch) is None and self._guard(self._send_one) is None:
                    self._lose_first()
                self._beat()
            self._beat()

    def _lose_first(self) -> None:
        with self._lock:
            _, _, num_bytes = self._queue.popleft()
            self._queued_bytes -= num_bytes
        self.drop(0, num_bytes)

    def _send_one(self) -> bool:
        return self._send_batch(1)

    def _send_batch(self, most: int = _BATCH_MESSAGES) -> bool:
        """What has waited longest leaves the queue when ZeroMQ has it, or when its frames cannot be made. True."""
        heads: list[tuple[bytes, list[int]]] = []
        bodies: list[Any] = []
        num_taken = num_bytes = 0
        while num_taken < min(most, len(self._queue)):
            head, frames, more_bytes = self._queue[num_taken]
            if num_taken and num_bytes + more_bytes > _BATCH_BYTES:
                break
            num_taken, num_bytes = num_taken + 1, num_bytes + more_bytes
            made = frames if isinstance(frames, Sequence) else frames()
            self._queue[num_taken - 1] = (head, made or (), more_bytes)  # made once, should this be tried again
            if made is None:
                self.drop(0, more_bytes)
                continue
            views = [_bytes_of(frame) for frame in made]
            heads.append((head, [view.nbytes for view in views]))
            bodies += views
        if num_bytes <= _JOIN_BYTES:
            bodies = [b"".join(bodies)]
        while heads and not self._send([encode_batch(heads), *bodies]):
            pass
        with self._lock:
            for _ in range(num_taken):
                self._queue.popleft()
            self._queued_bytes -= num_bytes
        return True

    def _beat(self) -> None:
        """Between rows too: a queue that never empties is when the sidecar most needs to hear of drops."""
        if time.monotonic() - self._beat_s >= _HEARTBEAT_S:
            self._beat_s = time.monotonic()
            head = encode(Heartbeat(self._version(), dict(self.counters)))
            self._send([encode_batch([(head, [])]), b""])

    def _send(self, parts: list[Any]) -> bool:
        try:
            self._socket.send_multipart(parts, copy=False)
        except zmq.Again:
            return False
        return True


def _bytes_of(frame: Any) -> memoryview:
    """Flat; a view with a zero in its shape (rows without a teacher) cannot be cast."""
    view = memoryview(frame)
    return view.cast("B") if view.nbytes else memoryview(b"")


class SampleReceiver:
    """Sidecar side of the samples stream."""

    def __init__(self, endpoint: str):
        self._received: deque[tuple[bytes, list[memoryview]]] = deque()
        """of the last batch, not given out yet"""
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, _SEND_HWM)
        self._socket.connect(endpoint)

    def receive(self, timeout_s: float) -> tuple[SampleMessage, list[memoryview]] | None:
        """Next message and its frames; None when none came in time.

        Raises: WireError where the bytes are no sample message.
        """
        if not self._received:
            if not self._socket.poll(int(timeout_s * 1000)):
                return None
            heads, *bodies = self._socket.recv_multipart(copy=False)
            self._received.extend(messages_of(bytes(heads.buffer), [body.buffer for body in bodies]))
        head, frames = self._received.popleft()
        return decode_sample(head), frames

    def close(self) -> None:
        self._socket.close(0)


class ControlServer:
    """Server side of control: one thread that answers each request exactly once."""

    def __init__(self, endpoint: str, answer: Callable[[ControlRequest], ControlReply]):
        self._answer = answer
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        threading.Thread(target=self._run, name="onlinespec-control", daemon=True).start()

    def _run(self) -> None:
        while True:
            identity, empty, *parts = self._socket.recv_multipart()
            try:
                reply = self._answer(decode_request(b"".join(parts)))
            except WireError as error:
                reply = Ack(False, str(error))
            self._socket.send_multipart([identity, empty, encode(reply)])


class ControlClient:
    """Client side of control; a fresh REQ socket per request, so a lost reply cannot wedge it."""

    def __init__(self, endpoint: str):
        self._endpoint = endpoint

    def request(self, request: ControlRequest, timeout_s: float = 30.0) -> ControlReply:
        """Send and wait for the one answer.

        Raises: WireError where no answer came in time, or it does not decode.
        """
        socket: zmq.Socket[bytes]
        with zmq.Context.instance().socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._endpoint)
            socket.send(encode(request))
            if not socket.poll(int(timeout_s * 1000)):
                raise WireError(
                    f"no answer from the server at {self._endpoint} within {timeout_s:.0f} s;"
                    " is it running, and is this its run directory?"
                )
            return decode_reply(socket.recv())

    def acknowledged(self, request: ControlRequest, timeout_s: float = 300.0) -> Ack:
        """Raises: WireError where the answer is no `Ack`."""
        reply = self.request(request, timeout_s)
        if isinstance(reply, Hello | Status):
            raise WireError(f"the server answered {type(reply).__name__}, wanted an Ack")
        return reply
