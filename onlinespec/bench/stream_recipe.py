"""The usual online recipe beside a live server of ours: `python -m onlinespec.bench.stream_recipe RUN_DIR`.

It stands where the sidecar would: the same rows by the same wire, the same learner with the recipe's settings (they are
in the run directory's config), the same swap. What it has not is a gate: every SWAP_EVERY_STEPS optimizer steps the
weights go into service as they are. The journal knows nothing of it.
"""

import signal
import sys
import time
from pathlib import Path

import torch

from onlinespec.bench.arms import SWAP_EVERY_STEPS
from onlinespec.courtesy import step_back
from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.header import digest
from onlinespec.errors import BenchError
from onlinespec.intake import Intake
from onlinespec.launch import read_launch
from onlinespec.paths import RunPaths
from onlinespec.resolve import load_config
from onlinespec.trainer.learner import Learner
from onlinespec.versions.store import VersionStore
from onlinespec.wire.messages import RequestEnded, RequestStarted, Swap
from onlinespec.wire.sockets import ControlClient

_RECEIVE_SLICE_S = 1.0


class Recipe:
    """Receives, steps, swaps."""

    def __init__(self, root: Path):
        self._paths = RunPaths(root)
        launch = read_launch(root)
        config = load_config([self._paths.resolved_config])
        torch.set_num_threads(config.trainer.num_threads)
        self._draft_config, weights = read_draft(self._paths.version(launch.version))
        is_fresh = VersionStore(self._paths).manifest(launch.version).provenance.is_fresh
        self._learner = Learner(config, self._draft_config, weights, read_embedding(launch.model), is_fresh)
        self._control = ControlClient(self._paths.control_endpoint)
        self._intake = Intake(self._paths.samples_endpoint, config.buffer)
        self._version = launch.version
        self._swapped_at_step = 0
        self._is_stopped = False

    def run(self) -> None:
        """Until SIGTERM."""
        signal.signal(signal.SIGTERM, self._stop)
        while not self._is_stopped:
            self.turn()

    def turn(self) -> None:
        """Take what waits, then one step where one is paid for, and the swap that is due after it."""
        self._receive()
        has_stepped = self._learner.step(time.time()) is not None
        if has_stepped and self._learner.trainer.num_steps - self._swapped_at_step >= SWAP_EVERY_STEPS:
            self._swap()

    def _stop(self, _number: int, _frame: object) -> None:
        self._is_stopped = True

    def _receive(self) -> None:
        timeout_s = 0.0 if self._learner.is_due else 0.05
        until_s = time.monotonic() + _RECEIVE_SLICE_S
        while time.monotonic() < until_s and (message := self._intake.next_message(timeout_s)) is not None:
            timeout_s = 0.0
            if isinstance(message, RequestStarted):
                self._intake.assembler.start(message)
            elif isinstance(message, RequestEnded) and (sample := self._intake.assembler.end(message)) is not None:
                self._learner.add(sample, time.time())

    def _swap(self) -> None:
        """Raises: BenchError where the server refuses."""
        self._swapped_at_step = self._learner.trainer.num_steps
        self._version += 1
        folder = self._paths.version(self._version)
        write_draft(folder, self._draft_config, self._learner.trainer.weights())
        ack = self._control.acknowledged(Swap(self._version, str(folder), digest(folder)))
        if not ack.is_ok:
            raise BenchError(f"the server refused the recipe's version {self._version}: {ack.message}")


def main() -> None:
    step_back()
    Recipe(Path(sys.argv[1])).run()


if __name__ == "__main__":
    main()
