"""Composition root inside the scheduler process: wires fuse, tap, swap and sockets to the hooks.

One instance per rank. Rank 0 owns the sockets and the tap; every rank swaps. Control requests are answered
by the control thread; what must happen between two iterations travels through SGLang's own broadcast, so
that all ranks see it at the same one.
"""

import functools
import queue
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import sglang
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_parallel

from onlinespec.config import Config
from onlinespec.draft.header import read_shapes
from onlinespec.errors import SwapError
from onlinespec.launch import Launch, read_launch
from onlinespec.paths import RunPaths
from onlinespec.plugin.fuse import Fuse
from onlinespec.plugin.requests import RequestBook
from onlinespec.plugin.sites import Site
from onlinespec.plugin.swap import ApplyVersion, StageVersion, Swapper
from onlinespec.plugin.tap import Tap
from onlinespec.resolve import load_config
from onlinespec.wire.messages import (
    Ack,
    ControlReply,
    ControlRequest,
    GetHello,
    GetStatus,
    Hello,
    SetCapture,
    Status,
    Swap,
)
from onlinespec.wire.sockets import ControlServer, SampleSender

_SWAP_TIMEOUT_S = 60.0


class Delivery(msgspec.Struct):
    """Rides SGLang's request broadcast to every rank. number: rank 0's own, to find its waiter."""

    number: int
    order: StageVersion | ApplyVersion


class _Waiter:
    """What the control thread waits on until the scheduler handled its delivery."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.is_taken = False
        """on its way to the ranks: it can no longer be given up"""
        self.error = "a fault in the server"
        """empty once the order was carried out"""


class Runtime:
    """See the module's docstring. Hook methods are called by SGLang through the fuse."""

    def __init__(self, root: Path, sites: list[Site]):
        self._paths = RunPaths(root)
        self._config: Config = load_config([self._paths.resolved_config])
        self._launch: Launch = read_launch(root)
        self._sites = sites
        self.fuse = Fuse(self._config.capture.fuse_faults, self._config.capture.fuse_retry_s)
        self._scheduler: Any = None
        self._swapper: Swapper | None = None
        self._tap: Tap | None = None
        self._sender: SampleSender | None = None
        self._outbox: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self._waiters: dict[int, _Waiter] = {}
        self._num_deliveries = 0
        self._lock = threading.Lock()

    def after_init_request_dispatcher(self, _result: Any, scheduler: Any) -> None:
        """The workers exist: register our message and, on rank 0, open the sockets."""
        self.fuse.run(self._attach, scheduler, is_vital=True)

    def _attach(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        scheduler._request_dispatcher._mapping[Delivery] = functools.partial(self.fuse.run, self._handle, is_vital=True)
        swapper = Swapper(scheduler, read_shapes(Path(self._launch.draft)), self._launch.version)
        self._swapper = swapper
        if get_parallel().tp_rank != 0:
            return
        self._sender = SampleSender(
            self._paths.samples_endpoint, self._config.capture.queue_bytes, lambda: swapper.version
        )
        if not self._launch.capture_refused:
            self._tap = Tap(
                self._sender,
                RequestBook(self._is_greedy()),
                self._config.capture.teacher_top_k,
                lambda: swapper.version,
                self.fuse.run,
            )
            self._tap.is_enabled = self._config.capture.enabled
        ControlServer(self._paths.control_endpoint, self._answer)

    def around_forward(self, original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self._tap is None:
            return original(worker, batch, *args, **kwargs)
        layout = self.fuse.run(self._tap.before, batch)
        result = original(worker, batch, *args, **kwargs)
        if layout is not None:
            self.fuse.run(self._tap.after, result, layout)
        return result

    def before_sampler(self, _sampler: Any, logits_output: Any, *_args: Any, **_kwargs: Any) -> None:
        if self._tap is not None:
            self.fuse.run(self._tap.before_sampler, logits_output)

    def after_pull_raw_reqs(self, requests: Any, *_args: Any) -> Any:
        """Rank 0 adds what waits; the others get None from SGLang and see it by broadcast."""
        if requests is not None:
            self.fuse.run(self._note_load, is_vital=True)
            if not self._outbox.empty():
                self.fuse.run(self._take_deliveries, requests, is_vital=True)
        return requests

    def _note_load(self) -> None:
        """For the next heartbeat. Every iteration, an idle one too: SGLang filters what has finished after this."""
        if self._sender is not None:
            self._sender.counters["running_requests"] = len(self._scheduler.running_batch.reqs)
            if self._tap is not None:
                self._sender.counters["requests_sampled_out"] = self._tap.book.num_sampled_out

    def _take_deliveries(self, requests: list[Any]) -> None:
        while not self._outbox.empty():
            delivery = self._outbox.get_nowait()
            with self._lock:
                waiter = self._waiters.get(delivery.number)
                if waiter is not None:
                    waiter.is_taken = True
                    requests.append(delivery)

    def _is_greedy(self) -> bool:
        return str(self._scheduler.draft_worker.device) == "cpu"

    def _handle(self, delivery: Delivery) -> None:
        """On the scheduler's thread of every rank."""
        assert self._swapper is not None
        with self._lock:
            waiter = self._waiters.pop(delivery.number, None) or _Waiter()
        try:
            if isinstance(delivery.order, StageVersion):
                self._swapper.begin_stage(delivery.order)
            else:
                self._swapper.apply(delivery.order)
            waiter.error = ""
        except SwapError as error:
            waiter.error = str(error)
        finally:
            waiter.done.set()

    def _deliver(self, order: StageVersion | ApplyVersion) -> None:
        """From the control thread: send to all ranks and wait until this one has handled it."""
        self._num_deliveries += 1
        number, waiter = self._num_deliveries, _Waiter()
        self._waiters[number] = waiter
        self._outbox.put(Delivery(number, order))
        if not waiter.done.wait(_SWAP_TIMEOUT_S):
            with self._lock:
                if not waiter.is_taken:
                    del self._waiters[number]
                    raise SwapError(
                        f"the scheduler did not take the swap within {_SWAP_TIMEOUT_S:.0f} s; it is given up"
                    )
            waiter.done.wait()
        if waiter.error:
            raise SwapError(waiter.error)

    def _answer(self, request: ControlRequest) -> ControlReply:
        reply = self.fuse.run(self._reply, request, is_vital=True)
        return Ack(False, f"fault in the server: {self.fuse.last_fault}") if reply is None else reply

    def _reply(self, request: ControlRequest) -> ControlReply:
        assert self._swapper is not None
        match request:
            case GetHello():
                return self._hello()
            case GetStatus():
                return self._status()
            case SetCapture(enabled, sample_frac):
                if self._tap is None:
                    return Ack(False, self._launch.capture_refused, self._swapper.version)
                if enabled is not None:
                    self._tap.is_enabled = enabled
                if sample_frac is not None:
                    self._tap.book.sample_frac = sample_frac
                return Ack(True, version=self._swapper.version)
            case Swap():
                return self._swap(request)

    def _swap(self, request: Swap) -> Ack:
        swapper = self._swapper
        assert swapper is not None
        try:
            self._deliver(StageVersion(request.version, request.path, request.digest))
            swapper.wait_staged()
            self._deliver(ApplyVersion(request.version))
        except SwapError as error:
            return Ack(False, f"{error} {self.fuse.last_fault}".rstrip(), swapper.version)
        assert swapper.version == request.version, (swapper.version, request.version)
        return Ack(True, version=swapper.version, duration_s=swapper.last_duration_s)

    def _hello(self) -> Hello:
        worker, config = self._scheduler.draft_worker, self._scheduler.model_config
        return Hello(
            sglang_version=sglang.__version__,
            sites=[site.name for site in self._sites if site.hook == "none" or site.target in HookRegistry._patched],
            vocab_size=int(config.vocab_size),
            hidden_size=int(config.hidden_size),
            num_aux=int(worker._draft_worker.draft_runner.model.model.num_aux_hidden_states),
            num_draft_steps=int(worker.speculative_num_steps),
            greedy_verify=self._is_greedy(),
            capture=self._tap is not None and self._tap.is_enabled,
            capture_refused=self._launch.capture_refused,
            version=self._swapper.version if self._swapper else 0,
            generation_prompt=self.fuse.run(generation_prompt, self._scheduler.tokenizer, is_vital=True) or [],
        )

    def _status(self) -> Status:
        assert self._swapper is not None
        counters: Counter[str] = Counter(self.fuse.counters)
        if self._sender is not None:
            counters.update(self._sender.counters)
        return Status(
            version=self._swapper.version,
            num_swaps=self._swapper.num_swaps,
            capture=self._tap is not None and self._tap.is_enabled,
            fuse=self.fuse.state,
            last_fault=self.fuse.last_fault,
            counters=dict(counters),
            sample_frac=self._tap.book.sample_frac if self._tap is not None else 1.0,
        )


def generation_prompt(tokenizer: Any) -> list[int]:
    """Tokens the chat template writes between a user's message and any answer to it, not only the last one.

    Some templates append more to the last turn (an empty think block); what an earlier answer does not
    show is cut off. Empty where there is no chat template.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return []

    def tokens(roles: str, add: bool) -> list[int]:
        turns = [{"role": {"u": "user", "a": "assistant"}[role], "content": "x"} for role in roles]
        return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, add_generation_prompt=add))

    question = len(tokens("u", False))
    appended, answered = tokens("u", True)[question:], tokens("uau", False)[question:]
    common = 0
    while common < min(len(appended), len(answered)) and appended[common] == answered[common]:
        common += 1
    return appended[:common]
