"""Orders: from the control thread to every rank, at the same iteration of each.

An order rides SGLang's own request broadcast. The control thread waits until this rank has carried it out;
one that the scheduler does not take in time is given up, one that is on its way no longer can be. What takes a rank
long, it does in a thread of its own, and the control thread asks all of them again until none is still at it: no
scheduler's thread waits for another rank's disk.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from onlinespec.errors import NotYetError, SwapError
from onlinespec.plugin.swap import ApplyVersion, ExpectStaged, StageVersion
from onlinespec.wire.messages import ExportEmbedding, SetDepth, StartSwitchback, StopSwitchback

_TIMEOUT_S = 60.0
_AGAIN_S = 0.02
logger = logging.getLogger(__name__)


class FinishExport(msgspec.Struct, frozen=True):
    """To every rank: say whether what `ExportEmbedding` asked for is written. None waits."""


Order = (
    StageVersion
    | ExpectStaged
    | ApplyVersion
    | StartSwitchback
    | StopSwitchback
    | SetDepth
    | ExportEmbedding
    | FinishExport
)


class Delivery(msgspec.Struct):
    """Rides SGLang's request broadcast to every rank. number: rank 0's own, to find its waiter."""

    number: int
    order: Order


class _Waiter:
    """What the control thread waits on until the scheduler handled its delivery."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.is_taken = False
        """on its way to the ranks: it can no longer be given up"""
        self.error: SwapError | None = SwapError("a fault in the server")
        """None once the order was carried out"""


class Orders:
    """One per rank; only rank 0 sends. See the module's docstring."""

    def __init__(self) -> None:
        self._outbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._waiters: dict[int, _Waiter] = {}
        self._num_sent = 0
        self._lock = threading.Lock()

    @property
    def is_waiting(self) -> bool:
        return not self._outbox.empty()

    def send(self, order: Order) -> None:
        """From the control thread: to all ranks, and wait until this one has carried it out.

        Raises: SwapError where it was given up, or carrying it out failed.
        """
        self._num_sent += 1
        number, waiter = self._num_sent, _Waiter()
        self._waiters[number] = waiter
        self._outbox.put(Delivery(number, order))
        if not waiter.done.wait(_TIMEOUT_S):
            with self._lock:
                if not waiter.is_taken:
                    del self._waiters[number]
                    raise SwapError(f"the scheduler did not take the order within {_TIMEOUT_S:.0f} s; it is given up")
            waiter.done.wait()
        if waiter.error is not None:
            raise waiter.error

    def ask(self, order: Order) -> None:
        """From the control thread: send it again until no rank says `NotYetError`.

        Raises: SwapError as `send`, or where a rank is still at it after a minute.
        """
        deadline_s = time.monotonic() + _TIMEOUT_S
        while True:
            try:
                return self.send(order)
            except NotYetError as error:
                if time.monotonic() > deadline_s:
                    raise SwapError(f"{error}, after {_TIMEOUT_S:.0f} s; it is given up") from error
            time.sleep(_AGAIN_S)

    def take(self, requests: list[Any]) -> None:
        """On rank 0's scheduler thread: what waits joins the requests that are broadcast next."""
        while not self._outbox.empty():
            delivery = self._outbox.get_nowait()
            with self._lock:
                waiter = self._waiters.get(delivery.number)
                if waiter is not None:
                    waiter.is_taken = True
                    requests.append(delivery)

    def handle(self, delivery: Delivery, carry_out: Callable[[Order], None]) -> None:
        """On the scheduler's thread of every rank: carry it out and wake the one who waits."""
        with self._lock:
            waiter = self._waiters.pop(delivery.number, None) or _Waiter()
        try:
            carry_out(delivery.order)
            waiter.error = None
        except NotYetError as error:
            waiter.error = error
        except SwapError as error:
            waiter.error = error
            logger.error("onlinespec: %s", error)  # another rank than 0 has nobody to tell
        finally:
            waiter.done.set()
