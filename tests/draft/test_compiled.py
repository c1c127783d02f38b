"""How often a draft's layers are compiled: counted, with torch's own backend that compiles nothing."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from onlinespec.config import TrainerConfig
from onlinespec.draft import compiled
from onlinespec.trainer.step import Trainer
from tests.draft.tiny import build_draft, build_embedding, build_sample

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns of its own doings


@pytest.fixture
def eager(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("num_layers", [1, 3])
def test_batches_of_other_sizes_are_not_compiled_for_again(eager, num_layers):
    draft = build_draft(num_layers=num_layers)
    trainer = Trainer(TrainerConfig(unroll_steps=3, compile=True), draft.config, draft.weights(), build_embedding())

    num_compiled = []
    for seed in range(6):
        trainer.step([build_sample(seed, 3 + seed, 9 + 2 * seed)])
        num_compiled.append(counters["stats"]["unique_graphs"])

    assert num_compiled[2:] == [num_compiled[2]] * 4
    assert counters["unimplemented"] == {}


def test_what_would_be_compiled_for_every_call_is_compiled_no_more_often_than_the_bound(eager, monkeypatch):
    monkeypatch.setattr(compiled, "MAX_COMPILATIONS", 3)
    times_length = compiled.compiled(lambda x_N, name: x_N * len(name))

    found = [times_length(torch.ones(4), "a" * number) for number in range(9)]

    assert counters["stats"]["unique_graphs"] == 3
    assert [x_N.tolist() for x_N in found] == [[number] * 4 for number in range(9)]
