"""Switchback and depth on the real server, under load: no answer changes, no row is missing."""

import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.header import digest
from onlinespec.draft.model import Draft
from onlinespec.draft.walk import accept_length, walk
from onlinespec.operate import roll_back
from onlinespec.wire.messages import (
    Ack,
    BlockEnded,
    GetHello,
    GetStatus,
    SetDepth,
    StartSwitchback,
    StopSwitchback,
    Swap,
)
from onlinespec.world import WORLD
from tests.integration.drafted import NUM_DRAFT_STEPS, count_walked
from tests.integration.servers import flush, world_prompts

PROMPTS = world_prompts(12, seed=43, domains=("code", "support"))
MAX_TOKENS = 32


@pytest.fixture(scope="module")
def embed_VD():
    return read_embedding(WORLD).float()


@pytest.fixture(scope="module")
def second(served, learned) -> Draft:
    """The trained draft, in service when a test begins."""
    if served.control.request(GetStatus()).version != 2:
        roll_back(served.paths.root, to=2)
    config, weights = read_draft(served.paths.version(2))
    return Draft(config, weights)


@pytest.fixture(scope="module")
def before(capture, second) -> dict[str, str]:
    """Greedy answers at the full depth with one draft, by prompt."""
    answers, _ = capture.send(PROMPTS, max_tokens=MAX_TOKENS)
    return texts(answers)


@pytest.fixture
def fresh(served, before) -> Iterator[None]:
    """An empty prefix cache before, full depth and no switchback after."""
    flush(served)
    yield
    served.control.acknowledged(StopSwitchback())
    served.control.acknowledged(SetDepth(NUM_DRAFT_STEPS))


def texts(answers) -> dict[str, str]:
    return {answer.prompt.messages[0]["content"]: answer.text for answer in answers}


def switchback_to(served, version: int, **changes) -> StartSwitchback:
    path = str(served.paths.version(version))
    return StartSwitchback(version, path, digest(path), **{"block_steps": 6, "num_pairs": 3, "seed": 5, **changes})


def test_a_switchback_under_load_drafts_with_both_versions_and_changes_no_answer(served, capture, before, fresh):
    order = switchback_to(served, 1)
    capture.blocks.clear()
    num_swaps = served.control.request(GetStatus()).num_swaps

    acks = [served.control.acknowledged(order) for _ in range(2)]
    running = served.control.request(GetStatus())
    refused = served.control.acknowledged(switchback_to(served, 1, seed=6))
    answers, samples = capture.send(PROMPTS, max_tokens=MAX_TOKENS)
    after = served.control.request(GetStatus())

    assert all(ack.is_ok for ack in acks)
    assert "runs; stop it first" in refused.message
    assert (running.switchback, running.version, after.switchback, after.version) == (1, 2, 0, 2)
    assert after.num_swaps == num_swaps
    assert after.last_fault == "", "the target's checksum is compared at every change"
    assert texts(answers) == before
    assert all(sample.is_complete for sample in samples)
    assert_blocks(capture.blocks, order)
    steps = Counter(version for sample in samples for version in sample.verify.version)
    mixed = Counter(s.verify.version[i] for s in samples for i in range(len(s.verify)) if s.verify.is_mixed[i])
    assert min(steps.values()) > min(mixed.values()) >= 4
    assert set(steps) == set(mixed) == {1, 2}


def assert_blocks(blocks: list[BlockEnded], order: StartSwitchback) -> None:
    assert [(block.pair, block.index) for block in blocks] == [(p, i) for p in range(order.num_pairs) for i in (0, 1)]
    assert all({a.version, b.version} == {1, 2} for a, b in zip(blocks[::2], blocks[1::2], strict=True))
    assert {block.num_steps for block in blocks} == {order.block_steps - 1}
    assert all(block.num_requests <= block.num_tokens <= 4 * block.num_requests for block in blocks)
    assert sum(block.num_timed_steps for block in blocks) > order.block_steps
    assert all(bool(block.wall_us) == bool(block.num_timed_steps) for block in blocks)
    rates = {
        version: sum(b.num_tokens for b in blocks if b.version == version)
        / sum(b.num_requests for b in blocks if b.version == version)
        for version in (1, 2)
    }
    assert rates[2] > rates[1], "version 1 is untrained"


def test_a_stop_and_a_swap_end_a_switchback_with_the_right_weights(served, capture, second, embed_VD, fresh):
    order = switchback_to(served, 1, num_pairs=1000)

    acks = [served.control.acknowledged(order), served.control.acknowledged(StopSwitchback())]
    acks += [served.control.acknowledged(order)]
    sending = threading.Thread(target=capture.send, args=(PROMPTS[:6],), kwargs={"max_tokens": MAX_TOKENS})
    sending.start()
    sending.join()
    path = str(served.paths.version(2))
    acks += [served.control.acknowledged(Swap(2, path, digest(path)))]
    status = served.control.request(GetStatus())
    flush(served)
    _, samples = capture.send(PROMPTS[6:], max_tokens=MAX_TOKENS)

    assert [ack.is_ok for ack in acks] == [True] * 4
    assert (status.switchback, status.version) == (0, 2)
    assert {version for sample in samples for version in sample.verify.version} == {2}
    assert count_walked(second, samples, embed_VD) > 5


def test_a_switchback_with_the_version_in_service_or_with_other_bytes_is_refused(served, before):
    with_itself = served.control.acknowledged(switchback_to(served, 2))
    damaged = served.control.acknowledged(StartSwitchback(1, str(served.paths.version(1)), "0" * 64, 8, 1, 0))

    assert with_itself == Ack(False, "version 2 is in service; a switchback wants another one", 2)
    assert not damaged.is_ok
    assert "digest" in damaged.message
    assert served.control.request(GetStatus()).switchback == 0


def test_depth_changes_under_load_change_no_answer_and_lose_no_row(served, capture, before, fresh):
    is_done, acks = threading.Event(), []

    def to_and_fro() -> None:
        while not is_done.wait(0.7):
            acks.append(served.control.acknowledged(SetDepth(NUM_DRAFT_STEPS if len(acks) % 2 else 0)))

    changer = threading.Thread(target=to_and_fro)
    changer.start()
    answers, samples = capture.send(PROMPTS, max_tokens=MAX_TOKENS)
    is_done.set()
    changer.join()

    assert len(acks) >= 3
    assert all(ack.is_ok for ack in acks)
    assert texts(answers) == before
    assert len(samples) == len(PROMPTS)
    assert all(sample.is_complete for sample in samples)
    assert {drafted for sample in samples for drafted in sample.verify.num_drafted} == {0, NUM_DRAFT_STEPS}
    for verify in (sample.verify for sample in samples):
        ends = [start + num for start, num in zip(verify.start, verify.num_committed, strict=True)]
        assert verify.start[1:] == ends[:-1]
        undrafted = [i for i, drafted in enumerate(verify.num_drafted) if not drafted]
        assert all((verify.num_correct[i], verify.num_committed[i]) == (0, 1) for i in undrafted)


def test_a_depth_for_some_steps_ends_after_them_and_changes_no_answer(served, capture, before, fresh):
    ack = served.control.acknowledged(SetDepth(0, for_steps=7))
    hello, status = served.control.request(GetHello()), served.control.request(GetStatus())

    answers, samples = capture.send(PROMPTS, max_tokens=MAX_TOKENS)

    undrafted = [sample.verify.num_drafted.count(0) for sample in samples]
    assert ack.is_ok
    assert (hello.depth, status.depth) == (NUM_DRAFT_STEPS, 0)
    assert served.control.request(GetStatus()).depth == NUM_DRAFT_STEPS
    assert max(undrafted) <= 7 <= sum(undrafted)
    assert texts(answers) == before


def test_samples_served_at_depth_zero_walk_as_if_drafted_and_the_draft_is_warm_afterwards(
    served, capture, second, embed_VD, fresh
):
    acks = [served.control.acknowledged(SetDepth(0)) for _ in range(2)]
    hello, status = served.control.request(GetHello()), served.control.request(GetStatus())
    refused = served.control.acknowledged(SetDepth(1))
    idle = served.control.acknowledged(switchback_to(served, 1))
    _, plain = capture.send(PROMPTS, max_tokens=MAX_TOKENS)
    served.control.acknowledged(SetDepth(NUM_DRAFT_STEPS))
    _, drafted = capture.send(PROMPTS, max_tokens=MAX_TOKENS)

    def mean_accept_length(samples) -> float:
        return sum(s.num_answer_tokens - 1 for s in samples) / sum(
            len(walk(second, s, embed_VD, NUM_DRAFT_STEPS)) for s in samples
        )

    assert [ack.is_ok for ack in acks] == [True, True]
    assert (hello.depth, hello.depths, hello.num_draft_steps) == (0, [0, NUM_DRAFT_STEPS], NUM_DRAFT_STEPS)
    assert (status.depth, status.depths) == (0, [0, NUM_DRAFT_STEPS])
    assert refused.message == "depth 1 was not prepared at start; choose one of 0, 3"
    assert "depth 0" in idle.message
    assert {accept_length(sample.verify) for sample in plain} == {1.0}
    assert mean_accept_length(plain) == mean_accept_length(drafted) > 1.02
    assert count_walked(second, drafted, embed_VD) > 10, "prompts' KV came from the cache that depth 0 filled"
    counters = served.control.request(GetStatus()).counters
    assert all(counters[f"decode_{what}_d{d}_b4"] for what in ("us", "steps", "tokens") for d in (0, NUM_DRAFT_STEPS))
