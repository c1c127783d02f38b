"""The recipe's trainer against a stand-in server, over the real wires."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from onlinespec.bench.arms import ARMS
from onlinespec.bench.stream_recipe import Recipe
from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.header import digest
from onlinespec.errors import BenchError
from onlinespec.launch import read_launch, write_launch
from onlinespec.paths import RunPaths
from onlinespec.resolve import dump_config, load_config
from onlinespec.wire.frames import header_of
from onlinespec.wire.messages import RequestEnded, RequestStarted, Rows, Segment
from onlinespec.wire.sockets import SampleSender
from tests.draft.tiny import write_target
from tests.fake_server import FakeServer, lay_out

PROMPT, TOKENS = 4, 12
SETTINGS = (*ARMS["recipe"].overrides, "trainer.unroll_steps=2", "trainer.batch_requests=1")


def send_request(sender: SampleSender, number: int) -> None:
    """A whole request: its prompt's rows, then those of one verify step that committed all of the answer."""
    rng = np.random.default_rng(number)
    tokens = [(number + 3 * i) % 29 for i in range(TOKENS)]
    prefill = Segment(number, False, 0, PROMPT, [tokens[PROMPT]], PROMPT, 1, 0, 0, 0, False)
    num_rows = TOKENS - PROMPT - 1
    verify = Segment(number, True, PROMPT, num_rows, tokens[PROMPT + 1 :], PROMPT + 1, num_rows, 3, 2, 1, False)
    frames = [
        rng.normal(size=(PROMPT + num_rows, 48)).astype(np.float32),
        rng.integers(0, 29, (1 + num_rows, 4)).astype(np.int32),
        rng.normal(size=(1 + num_rows, 4)).astype(np.float32),
        np.full(1 + num_rows, 5.0, np.float32),
    ]
    sender.offer(RequestStarted(number, "", tokens[:PROMPT], 0, 0.0, 0, 1.0, time.time()))
    sender.offer(Rows([prefill, verify], [header_of(frame) for frame in frames]), frames)
    sender.offer(RequestEnded(number, "stop", 1, 2, TOKENS - PROMPT, time.time()))


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run directory that serves version 1 of a draft for a target on disk."""
    write_target(tmp_path / "target")
    paths = lay_out(tmp_path)
    launch = msgspec.structs.replace(read_launch(tmp_path), model=str(tmp_path / "target"))
    write_launch(paths, launch)
    paths.resolved_config.write_text(dump_config(load_config([], SETTINGS)))
    return paths


@pytest.fixture
def parties(paths: RunPaths) -> Iterator[tuple[FakeServer, SampleSender, Recipe]]:
    server, sender = FakeServer(paths, 1), SampleSender(paths.samples_endpoint, 10**8, lambda: 1)
    recipe = Recipe(paths.root)
    yield server, sender, recipe
    recipe._intake._receiver.close()


def test_the_recipe_learns_from_what_the_server_sends_and_swaps_without_being_asked(paths, parties, monkeypatch):
    monkeypatch.setattr("onlinespec.bench.stream_recipe.SWAP_EVERY_STEPS", 2)
    server, sender, recipe = parties

    for number in range(5):
        send_request(sender, number)
    while len(server.swaps) < 2:
        recipe.turn()

    assert [swap.version for swap in server.swaps] == [2, 3]
    assert [swap.digest for swap in server.swaps] == [digest(paths.version(2)), digest(paths.version(3))]
    first, second = (read_draft(paths.version(version))[1] for version in (2, 3))
    assert not first["fc.weight"].equal(second["fc.weight"])


def test_a_swap_that_the_server_refuses_ends_the_recipe_with_its_reason(parties, monkeypatch):
    monkeypatch.setattr("onlinespec.bench.stream_recipe.SWAP_EVERY_STEPS", 1)
    server, sender, recipe = parties
    server.refusal = "no room"
    send_request(sender, 1)

    with pytest.raises(BenchError, match="refused the recipe's version 2: no room"):
        recipe.run()
