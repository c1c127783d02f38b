"""A stand-in server that speaks the real control wire, and a run directory for it."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from onlinespec.draft.checkpoint import write_draft
from onlinespec.launch import Launch, write_launch
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import Journal, Promoted, Published, RaceStarted, ServerStarted
from onlinespec.versions.manifest import Manifest, Provenance
from onlinespec.versions.store import VersionStore
from onlinespec.wire.messages import (
    Ack,
    ControlReply,
    ControlRequest,
    ExportEmbedding,
    GetHello,
    GetStatus,
    Hello,
    RenewPrefixes,
    SetDepth,
    StartSwitchback,
    Status,
    StopSwitchback,
    Swap,
)
from onlinespec.wire.sockets import ControlServer
from tests.draft.tiny import build_draft

PROVENANCE = Provenance(optimizer_steps=1, answer_tokens=1, seed=0, tenants=())
TARGET = "aaaa"


class FakeServer:
    """Answers control as the plugin does, and remembers what it was asked to serve."""

    def __init__(self, paths: RunPaths, version: int):
        self.version = version
        self.swaps: list[Swap] = []
        self.orders: list[StopSwitchback | StartSwitchback | SetDepth] = []
        self.refusal = ""
        self.switchback = 0
        self.counters: dict[str, int] = {}
        self.target_updates = 0
        self.num_renewed = 0
        self.embedding: list[torch.Tensor] = []
        """each rank's rows of the target's table"""
        ControlServer(paths.control_endpoint, self._answer)

    def _answer(self, request: ControlRequest) -> ControlReply:
        if isinstance(request, GetHello):
            return Hello("0", [], 29, 16, 3, 3, True, True, "", self.version, [], depth=3, depths=[3])
        if isinstance(request, GetStatus):
            told = (self.version, len(self.swaps), True, "closed", "", self.counters)
            return Status(*told, switchback=self.switchback, depth=3, target_updates=self.target_updates)
        if isinstance(request, RenewPrefixes):
            self.num_renewed += not self.refusal
            return Ack(not self.refusal, self.refusal, self.version)
        if isinstance(request, ExportEmbedding):
            for rank, rows in enumerate(self.embedding):
                save_file({"embed_tokens.weight": rows}, f"{request.directory}/{rank:010d}.safetensors")
            return Ack(not self.refusal, self.refusal, self.version)
        if isinstance(request, StopSwitchback | StartSwitchback | SetDepth):
            self.orders.append(request)
            return Ack(not self.refusal, self.refusal, self.version)
        assert isinstance(request, Swap)
        self.swaps.append(request)
        self.version = self.version if self.refusal else request.version
        return Ack(not self.refusal, self.refusal, self.version)


def publish(paths: RunPaths, parent: int | None, target_digest: str = TARGET) -> Manifest:
    """The next version, in the store and in the journal."""
    store = VersionStore(paths)
    draft = build_draft(seed=(store.latest() or 0) + 1)
    manifest = store.publish(
        lambda folder: write_draft(folder, draft.config, draft.weights()),
        parent=parent,
        target_digest=target_digest,
        provenance=PROVENANCE,
        created_s=1.0,
    )
    event = Published(time_s=1.0, version=manifest.version, digest=manifest.digest, parent=parent)
    Journal(paths).append(event)
    return manifest


def lay_out(root: Path) -> RunPaths:
    """A run directory whose third version is in service, after the first and the second."""
    paths = RunPaths(root)
    paths.create()
    write_launch(paths, Launch("m", "d", 1, TARGET, "127.0.0.1", 1, 3, 128, os.getpid()))
    journal = Journal(paths)
    publish(paths, None)
    journal.append(ServerStarted(time_s=1.0, version=1))
    for version in (2, 3):
        manifest = publish(paths, version - 1)
        journal.append(RaceStarted(time_s=2.0, candidate_digest=manifest.digest, alpha=0.01))
        journal.append(Promoted(time_s=2.0, version=version, from_version=version - 1, by="gate"))
    return paths
