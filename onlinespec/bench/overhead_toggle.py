"""What a running server of ours does beside serving, switched while it serves: nothing, the tap, the tap and training.

    off        capture off (`SetCapture`), the sidecar stopped (SIGSTOP)
    tap        capture on, the sidecar stopped: rows are taken, copied, gathered, encoded and sent to a `Drain`
    training   capture on, the sidecar running: it receives, trains and judges

A stopped process uses no CPU and keeps its state, so the three differ in nothing else, and the server needs no switch
for it. The drain throws rows away, so the server has the whole work of sending in each block and owes none to the
next; a few messages wait in the stopped sidecar's socket. Drops are counted by state. The draft is pinned, so that
training changes no accept length: candidates are judged, at their cost, and none comes into service.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

from onlinespec.errors import BenchError, WireError
from onlinespec.launch import read_launch
from onlinespec.operate import pin, unpin
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import Journal
from onlinespec.versions.state import state_of
from onlinespec.wire.messages import GetStatus, SetCapture, Status
from onlinespec.wire.sockets import ControlClient, SampleReceiver

State = Literal["off", "tap", "training"]
STATES: tuple[State, ...] = get_args(State)
_SIDECAR = b"onlinespec.sidecar"
_SIDECAR_S = 60.0
_DRAIN_POLL_S = 0.05


class Drain:
    """Receives what a server's tap sends and throws it away, from now until `close`."""

    def __init__(self, endpoint: str):
        self.num_messages = 0
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(endpoint,), daemon=True)
        self._thread.start()

    def _run(self, endpoint: str) -> None:
        receiver = SampleReceiver(endpoint)
        while not self._is_closing.is_set():
            with contextlib.suppress(WireError):  # what does not decode is thrown away like the rest
                self.num_messages += receiver.receive(_DRAIN_POLL_S) is not None
        receiver.close()

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join()


class Toggle:
    """Of one server, by its run directory. Only its own sidecar is ever signalled; `close` ends the drain."""

    def __init__(self, run_dir: Path, sidecar_pid: int):
        self.paths = RunPaths(run_dir)
        self.control = ControlClient(self.paths.control_endpoint)
        self.drain: Drain | None = None
        """while the state is `tap`"""
        self._pid = sidecar_pid

    def set(self, state: State) -> None:
        """Raises: WireError where the server does not answer; BenchError where the sidecar is gone."""
        try:
            os.kill(self._pid, signal.SIGCONT if state == "training" else signal.SIGSTOP)
        except ProcessLookupError as error:
            raise BenchError(f"the sidecar, process {self._pid}, is gone; its last words are in the log") from error
        self.close()
        if state == "tap":
            self.drain = Drain(self.paths.samples_endpoint)
        self.control.acknowledged(SetCapture(enabled=state != "off"))

    def close(self) -> None:
        if self.drain is not None:
            self.drain.close()
            self.drain = None

    def status(self) -> Status:
        """Raises: WireError."""
        reply = self.control.request(GetStatus())
        assert isinstance(reply, Status), reply
        return reply

    def trainer_steps(self) -> int:
        """Optimizer steps as the sidecar last reported them; 0 before its first report."""
        try:
            return json.loads(self.paths.sidecar_status.read_bytes())["trainer_step"]
        except FileNotFoundError:
            return 0


def find_sidecar(serve_pid: int) -> int:
    """The sidecar among the children of `serve` (Linux); waits for one that is being started.

    Raises: BenchError where there is none.
    """
    deadline_s = time.monotonic() + _SIDECAR_S
    while time.monotonic() < deadline_s:
        for pid in _children(serve_pid):
            with contextlib.suppress(OSError):  # it ended meanwhile
                if _SIDECAR in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    return pid
        time.sleep(0.2)
    raise BenchError(f"`serve`, process {serve_pid}, has no sidecar; start it without supervisor.sidecar=false")


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(entry.name)] if parent == pid else []
    return found


@contextlib.contextmanager
def toggling(run_dir: Path) -> Iterator[Toggle]:
    """With the draft in service pinned; afterwards all is as it was: the pin, the capture, the sidecar running.

    Raises: StartError where this is no run directory; BenchError where its server captures nothing.
    """
    launch = read_launch(run_dir)
    if launch.capture_refused:
        raise BenchError(
            f"{run_dir}: its server does not capture ({launch.capture_refused}); there is no tap to measure"
        )
    pid = find_sidecar(launch.serve_pid)
    toggle = Toggle(run_dir, pid)
    before = toggle.status()
    is_pinned = state_of(Journal(toggle.paths).read()).pinned is not None
    if not is_pinned:
        pin(run_dir, before.version, "bench overhead")
    try:
        yield toggle
    finally:
        toggle.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        with contextlib.suppress(WireError):  # it died: then there is nothing to put back
            toggle.control.acknowledged(SetCapture(enabled=before.capture))
            if not is_pinned:
                unpin(run_dir, "bench overhead")
