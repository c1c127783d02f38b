"""What watches a promoted draft, on the real server under load: the guard by its harm, the floor by its cost.

Drafts learned code, and code alone: 2.5 tokens a verify step (`parent`) and 3.1 (`child`), 1.0 on anything else.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from onlinespec.bench.client import Answer
from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.errors import VersionError
from onlinespec.operate import promote, roll_back
from onlinespec.resolve import load_config
from onlinespec.versions.journal import (
    AnyEvent,
    DepthChanged,
    GuardTripped,
    Journal,
    RolledBack,
    TargetChanged,
)
from onlinespec.versions.state import state_of
from onlinespec.wire.messages import GetStatus, SetDepth, Status
from onlinespec.world import WORLD
from tests.integration.conftest import publish
from tests.integration.drafted import NUM_DRAFT_STEPS
from tests.integration.learned import train_drafts
from tests.integration.servers import (
    Load,
    Server,
    free_port,
    send,
    sidecar,
    sidecar_status,
    start_ours,
    update_weights,
    wait_for,
    world_prompts,
)

QUICK_FLOOR = {
    "min_dwell_s": 2.0,
    "max_dwell_s": 8.0,
    "probe_every_s": 3.0,
    "probe_frac": 0.5,
    "min_accept_steps": 40,
    "cost_window_steps": 32,
}
NO_TRAINER = {"enabled": False}
MOST_REQUESTS = 40
"""finished between the damage and the rollback; 13 at the least by the guard's own arithmetic, and those in flight"""
BLOCK_STEPS = 16


@dataclass(frozen=True)
class Watched:
    """A server, and two drafts in its store, one trained on from the other."""

    server: Server
    parent: int
    child: int

    @property
    def status(self) -> Status:
        return self.server.control.request(GetStatus())

    def serve(self, version: int) -> None:
        if self.status.version != version:
            promote(self.server.paths.root, version)

    def events(self, *kinds: type) -> list[AnyEvent]:
        return [event for event in Journal(self.server.paths).read() if isinstance(event, kinds)]

    def num_samples(self) -> int:
        told = sidecar_status(self.server)
        return told.get("heldout_samples", 0) + told.get("training_samples", 0)

    def wait_for_depth(self, num_steps: int, before: int) -> DepthChanged:
        """The floor's own change to it: one of the journal beyond its first `before`."""
        wait_for(
            lambda: any(event.num_steps == num_steps for event in self.events(DepthChanged)[before:]),
            f"depth {num_steps}; {sidecar_status(self.server).get('depth')}",
        )
        return self.events(DepthChanged)[-1]


@pytest.fixture(scope="module")
def watched(tmp_path_factory, probe_plugin) -> Iterator[Watched]:
    """A server of its own: an update of the target, which another module tests, voids what a guard could return to."""
    directory, environment = probe_plugin
    sets = ["supervisor.sidecar=false", "floor.enabled=true"]
    server = start_ours(tmp_path_factory.mktemp("watched"), free_port(), sets=sets, environment=environment)
    server.probe = directory
    config = load_config([server.paths.resolved_config])
    parent_weights, child_weights = train_drafts(*read_draft(server.paths.version(1)), [2, 1], config.trainer)
    parent = publish(server, parent_weights, parent=1)
    yield Watched(server, parent, publish(server, child_weights, parent=parent))
    assert server.stop() == 0


@pytest.fixture
def on_child(watched) -> Iterator[None]:
    """In service at full depth."""
    watched.server.control.acknowledged(SetDepth(NUM_DRAFT_STEPS))
    watched.serve(watched.child)
    yield
    for name in ("corrupt", "delay"):
        (watched.server.probe / name).unlink(missing_ok=True)


def accept_length(answers: list[Answer]) -> float:
    steps = sum(answer.num_verify_steps for answer in answers)
    return (steps + sum(answer.num_correct_drafts for answer in answers)) / steps


def decoded(status: Status) -> tuple[int, int, int]:
    """Decode steps at full depth, their tokens and their requests (see `Heartbeat`), since the server's start."""
    return tuple(
        sum(count for name, count in status.counters.items() if name.startswith(f"decode_{what}_d{NUM_DRAFT_STEPS}_"))
        for what in ("steps", "tokens", "requests")
    )


def test_the_guard_does_not_blame_a_draft_for_a_shift_of_traffic(watched, on_child):
    with sidecar(watched.server, trainer=NO_TRAINER, floor={"enabled": False}):
        wait_for(lambda: sidecar_status(watched.server).get("version") == watched.child, "the sidecar")
        good = send(watched.server, world_prompts(16, seed=65, domains=("code",)), max_tokens=48)
        bad = send(watched.server, world_prompts(40, seed=65, domains=("support",)), max_tokens=32)
        wait_for(lambda: watched.num_samples() >= 56, "the samples")
        guard = sidecar_status(watched.server)["guard"]

    print(f"code {accept_length(good):.2f}, support {accept_length(bad):.2f}, guard {guard}")
    assert accept_length(bad) < accept_length(good) - 1.0
    assert guard["clean"]["requests"] + guard["aged"]["requests"] > 40
    assert guard["quality"]["requests"] > 10
    assert not watched.events(GuardTripped)
    assert watched.status.version == watched.child


def test_a_draft_damaged_in_the_servers_memory_is_rolled_back_and_accept_length_is_back(watched, on_child):
    with (
        sidecar(watched.server, trainer=NO_TRAINER, floor={"enabled": False}),
        Load(watched.server, seed=66) as load,
    ):
        wait_for(lambda: sidecar_status(watched.server).get("guard"), "the guard")
        wait_for(lambda: len(load.answers) >= 12, "answers")
        healthy = len(load.answers)
        (watched.server.probe / "corrupt").touch()
        wait_for(lambda: not (watched.server.probe / "corrupt").exists(), "the damage")
        damaged = len(load.answers)
        wait_for(lambda: watched.status.version == watched.parent, "a rollback")
        num_requests, before = len(load.answers) - damaged, decoded(watched.status)
        wait_for(lambda: decoded(watched.status)[0] >= before[0] + BLOCK_STEPS, "a block")
        after = decoded(watched.status)
        wait_for(lambda: watched.events(RolledBack)[-1].by == "guard", "the rollback in the journal")

    tripped, back = watched.events(GuardTripped, RolledBack)[-2:]
    block = (after[1] - before[1]) / (after[2] - before[2])
    lost = accept_length(load.answers[damaged + 4 : damaged + num_requests])
    good = accept_length(load.answers[:healthy])
    print(f"{good:.2f}, damaged {lost:.2f} for {num_requests} requests, then {block:.2f}; {tripped.evidence['reason']}")
    assert lost < 1.3
    assert num_requests <= MOST_REQUESTS
    assert isinstance(tripped, GuardTripped)
    assert tripped.evidence["harm"] == "integrity"
    assert (back.from_version, back.to_version, back.by) == (watched.child, watched.parent, "guard")
    assert back.barred_digest
    assert block > 2.0, "the parent's 2.5, less what stale keys cost"
    assert state_of(Journal(watched.server.paths).read()).incumbent == watched.parent


def test_an_untrained_draft_drafts_nothing_until_one_that_pays_is_in_service(watched):
    watched.server.control.acknowledged(SetDepth(NUM_DRAFT_STEPS))
    if watched.status.version != 1:
        roll_back(watched.server.paths.root, to=1)
    before = len(watched.events(DepthChanged))

    with sidecar(watched.server, trainer=NO_TRAINER, floor=QUICK_FLOOR):
        wait_for(lambda: watched.status.depth == 0, "depth 0")
        plain = send(watched.server, world_prompts(8, seed=61, domains=("code",)), max_tokens=32)
        wait_for(lambda: watched.num_samples() >= 8, "samples of depth 0")
        watched.serve(watched.parent)
        with Load(watched.server, seed=62) as load:
            event = watched.wait_for_depth(NUM_DRAFT_STEPS, before)
            drafted = len(load.answers)
            wait_for(lambda: len(load.answers) >= drafted + 8, "answers at full depth")

    print(f"up again: {event.reason}")
    assert accept_length(plain) == 1.0
    assert [e.num_steps for e in watched.events(DepthChanged)[before:]][:2] == [0, NUM_DRAFT_STEPS]
    assert event.by == "floor"
    assert "speculation pays" in event.reason
    assert accept_length(load.answers[-4:]) > 1.5


def test_a_slow_draft_is_not_used_until_it_is_quick_again_and_capture_goes_on(watched, on_child):
    asked = world_prompts(8, seed=63, domains=("code",))
    before = {a.prompt.messages[0]["content"]: a.text for a in send(watched.server, asked, max_tokens=32)}
    num_events = len(watched.events(DepthChanged))

    with sidecar(watched.server, trainer=NO_TRAINER, floor=QUICK_FLOOR), Load(watched.server, seed=64):
        wait_for(lambda: "speculation pays" in str(sidecar_status(watched.server).get("depth")), "a paying draft")
        paying = sidecar_status(watched.server)["depth"]
        (watched.server.probe / "delay").touch()
        down = watched.wait_for_depth(0, num_events)
        num_samples = watched.num_samples()
        answers = send(watched.server, asked, max_tokens=32)
        wait_for(lambda: watched.num_samples() >= num_samples + 8, "samples of depth 0")
        (watched.server.probe / "delay").unlink()
        up = watched.wait_for_depth(NUM_DRAFT_STEPS, num_events + 1)

    print(f"quick: {paying}; slow: {down.reason}; quick again: {up.reason}")
    assert "speculation does not pay" in down.reason
    assert "speculation pays" in up.reason
    assert {a.prompt.messages[0]["content"]: a.text for a in answers} == before
    assert watched.status.fuse == "closed"


def test_an_update_of_the_target_voids_what_was_learned_and_a_version_from_before_is_no_way_back(watched, on_child):
    embed_VD = read_embedding(WORLD).float()

    with sidecar(watched.server, trainer=NO_TRAINER, floor={"enabled": False}):
        wait_for(lambda: sidecar_status(watched.server).get("guard"), "the guard")
        update_weights(watched.server, "target", {"model.embed_tokens.weight": embed_VD * 1.01})
        wait_for(lambda: watched.events(TargetChanged), "the change in the journal")
        wait_for(lambda: "guard" in (status := sidecar_status(watched.server)) and status["guard"] is None, "no guard")
        send(watched.server, world_prompts(8, seed=68, domains=("code",)), max_tokens=16)
        wait_for(lambda: watched.num_samples() >= 8, "samples")
        missing = sidecar_status(watched.server)["embedding_missing"]
        with pytest.raises(VersionError, match="was trained for target"):
            roll_back(watched.server.paths.root, to=watched.parent)

    (changed,) = watched.events(TargetChanged)
    state = state_of(Journal(watched.server.paths).read())
    assert missing is None
    assert changed.num_updates == 1
    assert state.target_digest == changed.to_digest != changed.from_digest
    assert (state.incumbent, state.updated_from) == (watched.child, watched.child)
