"""One arm on one recorded stream: requests come again, are learned from, and the draft in service changes.

What is measured is the draft in service, by its accept walk over held-out requests of each domain, at the start and
after every swap: between two swaps nothing changes, so the course of its accept length is known at every token. The
same held-out requests judge every arm, order and seed, and the oracle; no arm learns from them or from a repeat of
their answers. The trainer here takes no time: a live one beside a busy server falls behind where it is too slow, which
`bench stream` without --replay shows.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from onlinespec.bench.arms import SWAP_EVERY_STEPS, Arm
from onlinespec.bench.replay_gate import ReplayGate, ReplayVerdict, Shape
from onlinespec.bench.replay_orders import Scheduled
from onlinespec.config import Config
from onlinespec.draft.model import Draft
from onlinespec.draft.sample import Sample
from onlinespec.draft.walk import walk
from onlinespec.errors import BenchError
from onlinespec.trainer.cluster import pooled
from onlinespec.trainer.learner import Learner

RECOVERY_LEVELS = (0.7, 0.8, 0.9)
"""shares of the oracle's accept length that count as recovered"""


@dataclass(frozen=True)
class World:
    """What all arms share. held_out, oracle: by domain, in the order in which domains come."""

    shape: Shape
    weights: dict[str, torch.Tensor]
    """of the draft to start with"""
    is_fresh: bool
    held_out: Mapping[str, Sequence[Sample]]
    oracle: Mapping[str, float]
    """accept length of a draft trained to the end on that domain"""


class Look(msgspec.Struct, frozen=True):
    """The draft in service from here on."""

    num_requests: int
    num_tokens: int
    """answer tokens of the stream so far"""
    accept_length: dict[str, float]


class Recovery(msgspec.Struct, frozen=True):
    """From a domain's first request until the draft in service first has a share of the oracle's accept length on it.

    num_requests, num_tokens: of the whole stream; where it was never reached, all that came, a lower bound.
    """

    level: float
    is_reached: bool
    num_requests: int
    num_tokens: int


class DomainResult(msgspec.Struct, frozen=True):
    """One domain's share of a row."""

    oracle: float
    """accept length"""
    final: float
    """accept length at the end of the stream"""
    forgotten: float
    """highest accept length there was less the final one"""
    regret_area: float
    """accept length short of the oracle's, summed over the domain's answer tokens, in thousands; never below 0"""
    num_tokens: int
    recoveries: tuple[Recovery, ...]


class ReplayRow(msgspec.Struct, frozen=True):
    """One arm, order and seed."""

    arm: str
    order: str
    seed: int
    domains: dict[str, DomainResult]
    looks: list[Look]
    begins: list[tuple[str, int, int]]
    """(domain, requests, answer tokens) where the stream's domain changes"""
    num_requests: int
    num_tokens: int
    num_swaps: int
    num_candidates: int
    """that got a race; of the recipe, which has none, 0"""
    num_held_out: int
    """requests of the stream that the gate kept from training"""
    verdicts: list[ReplayVerdict]
    optimizer_steps: int
    training_cpu_s: float


def accept_length(draft: Draft, samples: Iterable[Sample], shape: Shape) -> float:
    """Tokens over verify steps of the walk over these requests. Raises: BenchError where there is no verify step."""
    num_tokens = num_steps = 0
    for sample in samples:
        found = walk(draft, sample, shape.embed_VD, shape.num_draft_steps)
        num_tokens, num_steps = num_tokens + sum(found.num_committed), num_steps + len(found)
    if not num_steps:
        raise BenchError(
            "the held-out requests have no verify step: their answers are of one token; record longer ones"
        )
    return num_tokens / num_steps


class _Player:
    """Serves and learns as one arm does."""

    def __init__(self, arm: Arm, config: Config, world: World, seed: int):
        self.draft = Draft(world.shape.draft_config, world.weights)
        """in service"""
        self.gate = ReplayGate(config.gate, config.drift, world.shape, self.draft, seed) if arm.gate == "race" else None
        self.learner: Learner | None = None
        if arm.is_training:
            shape = world.shape
            weights = {name: tensor.clone() for name, tensor in world.weights.items()}
            self.learner = Learner(config, shape.draft_config, weights, shape.embed_VD, world.is_fresh)
        self.training_cpu_s = 0.0
        self.num_held_out = 0
        self._shape = world.shape
        self._candidate_steps = config.gate.candidate_steps
        self._frozen_at_step = 0

    @property
    def num_steps(self) -> int:
        return self.learner.trainer.num_steps if self.learner else 0

    def take(self, sample: Sample) -> bool:
        """A finished request; True where another draft is in service after it."""
        if self.learner is None:
            return False
        has_changed = False
        if self.gate is not None:
            sample, side = self.gate.side(sample)
            if side.is_judge:
                has_changed = self._judge(sample)
            if not side.trains:
                self.num_held_out += 1
                return has_changed
            self.gate.train(sample)
        began_s = time.thread_time()
        self.learner.add(sample, sample.ended_s)
        while self.learner.is_due:
            self.learner.step(sample.ended_s)
            has_changed |= self._offer(sample.ended_s)
        self.training_cpu_s += time.thread_time() - began_s
        return has_changed

    def _judge(self, sample: Sample) -> bool:
        assert self.gate is not None
        assert self.learner is not None
        clusters = self.learner.buffer.clusters
        cluster = clusters.nearest(pooled(sample.aux_TA, sample.has_aux_T))
        is_promoted = self.gate.observe(sample, cluster, clusters.ids)
        self.draft = self.gate.incumbent
        return is_promoted

    def _offer(self, now_s: float) -> bool:
        """A candidate where one is due; True where it is in service at once, for want of a gate."""
        assert self.learner is not None
        wanted = self._candidate_steps if self.gate else SWAP_EVERY_STEPS
        if self.num_steps - self._frozen_at_step < wanted:
            return False
        if self.gate is None:
            self._frozen_at_step = self.num_steps
            self.draft = Draft(self._shape.draft_config, self.learner.trainer.weights())
            return True
        if self.gate.may_offer(now_s):
            self._frozen_at_step = self.num_steps
            self.gate.offer(self.learner.trainer.weights(), now_s)
        return False


def play(
    arm: Arm,
    order: str,
    seed: int,
    stream: Sequence[Scheduled],
    config: Config,
    world: World,
    on_request: Callable[[], None] = lambda: None,
) -> ReplayRow:
    """The stream through one arm. config: of the arm, its overrides and seed applied."""
    player = _Player(arm, config, world, seed)
    looks = [_look(player.draft, world, 0, 0, arm.is_speculating)]
    begins: list[tuple[str, int, int]] = []
    num_tokens = 0
    for num_requests, (domain, sample) in enumerate(stream):
        if not begins or begins[-1][0] != domain:
            begins.append((domain, num_requests, num_tokens))
        num_tokens += sample.num_answer_tokens
        if player.take(sample):
            looks.append(_look(player.draft, world, num_requests + 1, num_tokens, arm.is_speculating))
        on_request()
    return ReplayRow(
        arm=arm.name,
        order=order,
        seed=seed,
        domains={domain: result_of(domain, world.oracle[domain], looks, stream) for domain in world.held_out},
        looks=looks,
        begins=begins,
        num_requests=len(stream),
        num_tokens=num_tokens,
        num_swaps=len(looks) - 1,
        num_candidates=player.gate.num_candidates if player.gate else 0,
        num_held_out=player.num_held_out,
        verdicts=player.gate.verdicts if player.gate else [],
        optimizer_steps=player.num_steps,
        training_cpu_s=player.training_cpu_s,
    )


def _look(draft: Draft, world: World, num_requests: int, num_tokens: int, is_speculating: bool) -> Look:
    if not is_speculating:
        return Look(num_requests, num_tokens, dict.fromkeys(world.held_out, 1.0))
    lengths = {domain: accept_length(draft, samples, world.shape) for domain, samples in world.held_out.items()}
    return Look(num_requests, num_tokens, lengths)


def result_of(domain: str, oracle: float, looks: Sequence[Look], stream: Sequence[Scheduled]) -> DomainResult:
    """What the course of the draft in service comes to on one domain.

    A request counts with the draft that was in service when it came. Source of `forgotten`: Chaudhry et al. 2018,
    "Riemannian Walk for Incremental Learning", section 3.2.
    """
    later = list(looks)
    regret = num_domain_tokens = num_tokens = 0.0
    first: tuple[int, int] | None = None
    recovered: dict[float, tuple[int, int]] = {}
    current = later.pop(0)
    for num_requests, (name, sample) in enumerate(stream):
        while later and later[0].num_requests <= num_requests:
            current = later.pop(0)
        if name == domain:
            first = first or (num_requests, int(num_tokens))
            regret += max(0.0, oracle - current.accept_length[domain]) * sample.num_answer_tokens
            num_domain_tokens += sample.num_answer_tokens
        if first is not None:
            for level in RECOVERY_LEVELS:
                if current.accept_length[domain] >= level * oracle:
                    recovered.setdefault(level, (num_requests - first[0], int(num_tokens) - first[1]))
        num_tokens += sample.num_answer_tokens
    begun = first or (len(stream), int(num_tokens))
    bound = len(stream) - begun[0], int(num_tokens) - begun[1]
    return DomainResult(
        oracle=oracle,
        final=looks[-1].accept_length[domain],
        forgotten=max(look.accept_length[domain] for look in looks) - looks[-1].accept_length[domain],
        regret_area=regret / 1000,
        num_tokens=int(num_domain_tokens),
        recoveries=tuple(
            Recovery(level, level in recovered, *recovered.get(level, bound)) for level in RECOVERY_LEVELS
        ),
    )
