"""The demo's domains, told apart by the hidden states of the demo's target alone."""

import itertools
import random

import pytest
import torch

from onlinespec.trainer.cluster import Clusters, pooled
from onlinespec.world import WORLD
from onlinespec.world.corpus import DOMAINS, live
from onlinespec.world.hf import AutoModelForCausalLM, AutoTokenizer

NUM_EACH = 25
LAYERS = (2, 4, 5)


@pytest.fixture(scope="module")
def points() -> list[tuple[str, torch.Tensor]]:
    """(domain, pooled hidden states) of a prompt with its reference answer. Shapes: [F]."""
    model = AutoModelForCausalLM.from_pretrained(WORLD, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(WORLD)
    found = []
    for domain in DOMAINS:
        for request in itertools.islice(live(domain, seed=1), NUM_EACH):
            turns = [{"role": "user", "content": request.user}, {"role": "assistant", "content": request.answer}]
            tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            with torch.inference_mode():
                states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
            aux_TA = torch.cat([states[layer][0] for layer in LAYERS], dim=1)
            found.append((domain, pooled(aux_TA, torch.ones(len(tokens), dtype=torch.bool))))
    return found


@pytest.mark.parametrize("is_mixed", [False, True])
def test_no_cluster_holds_two_domains_of_the_demo(points, is_mixed: bool):
    stream = random.Random(0).sample(points, len(points)) if is_mixed else points
    clusters = Clusters(8)
    for _, point_F in stream:
        clusters.add(point_F)

    found = {(domain, clusters.nearest(point_F)) for domain, point_F in points}

    assert len(found) == len(clusters) >= len(DOMAINS)
