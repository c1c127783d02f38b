"""Composition root inside the scheduler process: wires fuse, tap, swap and sockets to the hooks.

One instance per rank. Rank 0 owns the sockets and the tap; every rank swaps. Control requests are answered
by the control thread; what must happen between two iterations travels through SGLang's own broadcast, so
that all ranks see it at the same one.
"""

import functools
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sglang
import torch
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.runtime_context import get_parallel

from onlinespec.config import Config
from onlinespec.draft.header import digest, read_shapes
from onlinespec.errors import SwapError
from onlinespec.launch import Launch, read_launch
from onlinespec.paths import RunPaths
from onlinespec.plugin.commits import Carrier
from onlinespec.plugin.depth import Depth
from onlinespec.plugin.device import build_device
from onlinespec.plugin.embedding import EmbeddingExport
from onlinespec.plugin.fuse import Fuse
from onlinespec.plugin.meter import Meter, Step, StepRider, Turn
from onlinespec.plugin.orders import Delivery, FinishExport, Order, Orders
from onlinespec.plugin.prefix import PrefixGeneration
from onlinespec.plugin.requests import RequestBook
from onlinespec.plugin.ring import build_ring
from onlinespec.plugin.rows import RowCopier
from onlinespec.plugin.sites import Site
from onlinespec.plugin.swap import ApplyVersion, ExpectStaged, StageVersion, Swapper
from onlinespec.plugin.switchback import Switchback
from onlinespec.plugin.tap import Tap
from onlinespec.plugin.template import generation_prompt
from onlinespec.resolve import load_config
from onlinespec.wire.messages import (
    Ack,
    ControlReply,
    ControlRequest,
    ExportEmbedding,
    GetHello,
    GetStatus,
    Hello,
    RenewPrefixes,
    SetCapture,
    SetDepth,
    StartSwitchback,
    Status,
    StopSwitchback,
    Swap,
)
from onlinespec.wire.sockets import ControlServer, SampleSender

logger = logging.getLogger(__name__)
LEFT_ALONE = "the draft's weights were left as they are, onlinespec keeps them; hand it a draft with `onlinespec offer`"


class Runtime:
    """See the module's docstring. Hook methods are called by SGLang through the fuse."""

    def __init__(self, root: Path, sites: list[Site], build_carrier: Callable[[Callable[..., Any]], Carrier]):
        self._paths = RunPaths(root)
        config: Config = load_config([self._paths.resolved_config])
        self._capture = config.capture
        self._launch: Launch = read_launch(root)
        self._sites = sites
        self.fuse = Fuse(self._capture.fuse_faults, self._capture.fuse_retry_s)
        self.carrier = build_carrier(self.fuse.run)
        self._scheduler: Any = None
        self._swapper: Swapper | None = None
        self._tap: Tap | None = None
        self._sender: SampleSender | None = None
        self._meter: Meter | None = None
        self._switchback: Switchback | None = None
        self._depth: Depth | None = None
        self._export, self._orders, self._prefixes = EmbeddingExport(), Orders(), PrefixGeneration()

    def after_init_request_dispatcher(self, _result: Any, scheduler: Any) -> None:
        """The workers exist: register our message and, on rank 0, open the sockets."""
        self.fuse.run(self._attach, scheduler, is_vital=True)

    def _attach(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        scheduler._request_dispatcher._mapping[Delivery] = functools.partial(self.fuse.run, self._handle, is_vital=True)
        path = self._launch.draft
        in_service = StageVersion(self._launch.version, path, digest(path))
        place = next(scheduler.draft_worker._draft_worker.draft_runner.model.parameters()).device
        device = build_device(place, scheduler.forward_stream if scheduler.enable_overlap else None)
        reserve_bytes = self._capture.device_reserve_bytes
        swapper = self._swapper = Swapper(scheduler, device, read_shapes(Path(path)), in_service, reserve_bytes, _agree)
        self._depth = Depth(scheduler.draft_worker, self._launch.depth_refused)
        if get_parallel().tp_rank != 0:
            return
        capture = self._capture
        guard = functools.partial(self.fuse.run, is_vital=True)
        self._sender = SampleSender(self._paths.samples_endpoint, capture.queue_bytes, lambda: swapper.incumbent, guard)
        self._meter = Meter(self._sender.counters, self._sender.offer, bool(scheduler.enable_overlap))
        if not self._launch.capture_refused:
            chunk_tokens = scheduler.chunked_prefill_size or scheduler.max_prefill_tokens
            vocab_size, dtype = int(scheduler.model_config.vocab_size), scheduler.model_config.dtype
            ring = build_ring(device, capture, chunk_tokens * self._aux_width, dtype)
            copier = RowCopier(device, ring, capture.teacher_top_k, is_float8=capture.row_dtype == "float8")
            copier.warm_up(place, self._aux_width, vocab_size, dtype)
            self._tap = Tap(
                self._sender,
                RequestBook(self._is_greedy()),
                self.carrier,
                copier,
                lambda: swapper.version,
                self.fuse.run,
            )
            self._tap.is_enabled = capture.enabled
        ControlServer(self._paths.control_endpoint, self._answer)

    def around_forward(self, original: Any, worker: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.fuse.run(self._before_forward, batch, is_vital=True)
        tap = self._tap
        layout = self.fuse.run(tap.before, batch) if tap is not None else None
        result = original(worker, batch, *args, **kwargs)
        if tap is not None and layout is not None:
            self.fuse.run(tap.after, result, layout)
        if step is not None and self._meter is not None:
            self.fuse.run(self.carrier.attach, result, StepRider(self._meter, step, self.fuse.run))
        return result

    def after_verify(self, result: Any, *_args: Any, **_kwargs: Any) -> None:
        """The target has verified and the draft has not yet run again."""
        if self._tap is not None:
            self.fuse.run(self._tap.after_verify, result)

    def _before_forward(self, batch: Any) -> Step | None:
        """Change the draft where a switchback is due, before the tap notes who drafts. The step; None elsewhere."""
        if self._swapper is not None:
            self._swapper.checks.poll()
        mode = batch.forward_mode
        if mode.is_extend() or mode.is_idle() or not batch.reqs:
            if self._meter is not None:
                self._meter.interrupt()
            return None
        turn = None
        if self._switchback is not None:
            assert self._swapper is not None
            place = self._switchback.before_decode()
            if place is not None:
                turn = Turn(self._switchback.order, place, self._swapper.version)
        if self._meter is None or self._depth is None:
            return None
        return self._meter.begin(self._depth.num_steps, len(batch.reqs), turn)

    def around_update_weights(self, original: Any, updater: Any, *args: Any, **kwargs: Any) -> Any:
        """Others write weights: the target's evidence is void then. The draft's are ours and are left as they are:
        SGLang would load a checkpoint of the target into it, and die of the first shape that differs."""
        is_draft = self.fuse.run(self._note_update, updater, is_vital=True)
        return (True, LEFT_ALONE) if is_draft else original(updater, *args, **kwargs)

    def _note_update(self, updater: Any) -> bool:
        """Whether it is the draft's."""
        self._export.wait_copied()
        if self._meter is not None:
            self._meter.interrupt()
        is_draft = bool(updater.get_model_runner().is_draft_worker)
        if is_draft:
            logger.warning("onlinespec: %s", LEFT_ALONE)
        elif self._sender is not None:
            self._sender.counters["target_updates"] += 1
            if self._tap is not None:
                self._tap.book.num_target_updates = self._sender.counters["target_updates"]
        return is_draft

    def before_sampler(self, _sampler: Any, logits_output: Any, *_args: Any, **_kwargs: Any) -> None:
        if self._tap is not None:
            self.fuse.run(self._tap.before_sampler, logits_output)

    def after_pull_raw_reqs(self, requests: Any, *_args: Any) -> Any:
        """Rank 0 adds what waits; the others get None from SGLang and see it by broadcast."""
        if requests is not None:
            self.fuse.run(self._note_load, is_vital=True)
            self.fuse.run(self._prefixes.name, requests, is_vital=True)
            if self._orders.is_waiting:
                self.fuse.run(self._orders.take, requests, is_vital=True)
        return requests

    def _note_load(self) -> None:
        """For the next heartbeat. Every iteration, an idle one too: SGLang filters what has finished after this."""
        if self._meter is not None:
            self._meter.looked()
        if self._sender is not None:
            self._sender.counters["running_requests"] = len(self._scheduler.running_batch.reqs)
            if self._tap is not None:
                self._sender.counters["requests_sampled_out"] = self._tap.book.num_sampled_out

    def _is_greedy(self) -> bool:
        return str(self._scheduler.draft_worker.device) == "cpu"

    def _handle(self, delivery: Delivery) -> None:
        """On the scheduler's thread of every rank."""
        if self._meter is not None:
            self._meter.interrupt()
        self._orders.handle(delivery, self._carry_out)

    def _carry_out(self, order: Order) -> None:
        """Raises: SwapError."""
        swapper = self._swapper
        assert swapper is not None
        match order:
            case StageVersion():
                swapper.begin_stage(order)
            case ApplyVersion():
                swapper.apply(order)
            case ExpectStaged(version):
                swapper.expect_staged(version)
            case StartSwitchback():
                swapper.expect_staged(order.version)
                self._switchback = Switchback(order, swapper)
            case StopSwitchback():
                if self._switchback is not None:
                    self._switchback.end()
            case SetDepth(num_steps, for_steps):
                assert self._depth is not None
                self._depth.set(num_steps, for_steps)
            case ExportEmbedding():
                self._export.begin(order, swapper.model.model.embed_tokens, swapper.device)
            case FinishExport():
                self._export.expect_written(_agree)

    @property
    def _running(self) -> StartSwitchback | None:
        """The switchback that runs."""
        switchback = self._switchback
        return switchback.order if switchback is not None and switchback.is_running else None

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
                    return Ack(False, self._launch.capture_refused, self._swapper.incumbent)
                if enabled is not None:
                    self._tap.is_enabled = enabled
                if sample_frac is not None:
                    self._tap.book.sample_frac = sample_frac
                return Ack(True, version=self._swapper.incumbent)
            case Swap():
                return self._acknowledge(self._swap, request)
            case StartSwitchback():
                return self._acknowledge(self._start_switchback, request)
            case StopSwitchback():
                return self._acknowledge(self._orders.send, request)
            case SetDepth():
                return self._acknowledge(self._set_depth, request)
            case RenewPrefixes():
                return self._acknowledge(lambda _: self._prefixes.renew(), request)
            case ExportEmbedding():
                return self._acknowledge(self._export_embedding, request)

    def _acknowledge(self, carry_out: Callable[[Any], Any], request: ControlRequest) -> Ack:
        assert self._swapper is not None
        try:
            duration_s = carry_out(request) or 0.0
        except SwapError as error:
            return Ack(False, f"{error} {self.fuse.last_fault}".rstrip(), self._swapper.incumbent)
        return Ack(True, version=self._swapper.incumbent, duration_s=duration_s)

    def _swap(self, request: Swap) -> float:
        """Seconds the scheduler spent in it. Raises: SwapError."""
        swapper = self._swapper
        assert swapper is not None
        if self._running is not None:
            self._orders.send(StopSwitchback())
        self._stage(request)
        self._orders.send(ApplyVersion(request.version))
        assert swapper.version == request.version, (swapper.version, request.version)
        swapper.checks.wait()
        return swapper.last_duration_s

    def _start_switchback(self, request: StartSwitchback) -> None:
        """Raises: SwapError."""
        swapper, running = self._swapper, self._running
        assert swapper is not None
        if running == request:
            return
        if running is not None:
            raise SwapError(f"a switchback with version {running.version} runs; stop it first")
        if request.version == swapper.incumbent:
            raise SwapError(f"version {request.version} is in service; a switchback wants another one")
        if self._depth is not None and self._depth.lasting == 0:
            raise SwapError("nothing is drafted at depth 0; raise the depth before a switchback")
        self._stage(request)
        self._orders.send(request)

    def _stage(self, request: Swap | StartSwitchback) -> None:
        """On every rank. Raises: SwapError where one could not."""
        assert self._swapper is not None
        self._orders.send(StageVersion(request.version, request.path, request.digest))
        self._swapper.wait_staged()
        self._orders.ask(ExpectStaged(request.version))

    def _set_depth(self, request: SetDepth) -> None:
        """Raises: SwapError."""
        depth = self._depth
        assert depth is not None
        if refusal := depth.refusal(request.num_steps):
            raise SwapError(refusal)
        if depth.lasts(request.num_steps):
            return
        if self._running is not None:
            self._orders.send(StopSwitchback())
        self._orders.send(request)

    def _export_embedding(self, request: ExportEmbedding) -> None:
        """Raises: SwapError."""
        self._orders.send(request)
        self._export.wait_written()
        self._orders.ask(FinishExport())

    @property
    def _num_aux(self) -> int:
        return int(self._scheduler.draft_worker._draft_worker.draft_runner.model.model.num_aux_hidden_states)

    @property
    def _aux_width(self) -> int:
        """Captured values of a row."""
        return self._num_aux * int(self._scheduler.model_config.hidden_size)

    def _hello(self) -> Hello:
        config, depth = self._scheduler.model_config, self._depth
        assert depth is not None
        return Hello(
            sglang_version=sglang.__version__,
            sites=[site.name for site in self._sites if site.hook == "none" or site.target in HookRegistry._patched],
            vocab_size=int(config.vocab_size),
            hidden_size=int(config.hidden_size),
            num_aux=self._num_aux,
            num_draft_steps=depth.available[-1],
            greedy_verify=self._is_greedy(),
            capture=self._tap is not None and self._tap.is_enabled,
            capture_refused=self._launch.capture_refused,
            version=self._swapper.incumbent if self._swapper else 0,
            generation_prompt=self.fuse.run(generation_prompt, self._scheduler.tokenizer, is_vital=True) or [],
            depth=depth.lasting,
            depths=depth.available,
            depth_refused=depth.refused,
        )

    def _status(self) -> Status:
        assert self._swapper is not None
        assert self._depth is not None
        counters: Counter[str] = Counter(self.fuse.counters)
        if self._sender is not None:
            counters.update(self._sender.counters)
        return Status(
            version=self._swapper.incumbent,
            num_swaps=self._swapper.num_swaps,
            capture=self._tap is not None and self._tap.is_enabled,
            fuse=self.fuse.state,
            last_fault=self.fuse.last_fault,
            counters=dict(counters),
            sample_frac=self._tap.book.sample_frac if self._tap is not None else 1.0,
            switchback=self._running.version if self._running is not None else 0,
            depth=self._depth.num_steps,
            depths=self._depth.available,
            prefix_generation=self._prefixes.number,
            target_updates=counters["target_updates"],
        )


def _agree(is_so: bool) -> bool:
    """Whether it is so on every rank. A collective: all ranks call it at the same iteration."""
    group = get_parallel().tp_group
    if group.world_size == 1:
        return is_so
    flag = torch.tensor(int(is_so))
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(flag)
