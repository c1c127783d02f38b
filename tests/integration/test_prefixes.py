"""Draft KV that an older draft left in the prefix cache: what it costs, and that it can be computed anew."""

import pytest

from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.fresh import read_embedding
from onlinespec.draft.header import digest
from onlinespec.draft.model import Draft
from onlinespec.draft.walk import walk
from onlinespec.wire.messages import GetStatus, RenewPrefixes, Swap
from onlinespec.world import WORLD
from tests.integration.drafted import NUM_DRAFT_STEPS, count_walked
from tests.integration.servers import flush, world_prompts

PROMPTS = world_prompts(8, seed=47, domains=("code",))


def swap(served, version: int) -> None:
    path = served.paths.version(version)
    assert served.control.acknowledged(Swap(version, str(path), digest(path))).is_ok


def texts(answers) -> dict[str, str]:
    return {answer.prompt.messages[0]["content"]: answer.text for answer in answers}


@pytest.fixture
def cached_by_untrained(served, learned):
    """Every prompt is cached, by the untrained draft; the trained one is in service."""
    swap(served, 1)
    flush(served)
    return lambda capture: (capture.send(PROMPTS, max_tokens=8), swap(served, 2))


def test_prefixes_are_computed_anew_without_a_flush_and_live_is_the_shadow_again(served, capture, cached_by_untrained):
    config, weights = read_draft(served.paths.version(2))
    draft, embed_VD = Draft(config, weights), read_embedding(WORLD).float()
    before = served.control.request(GetStatus())
    cached_by_untrained(capture)

    stale, stale_samples = capture.send(PROMPTS, max_tokens=40)
    ack = served.control.acknowledged(RenewPrefixes())
    renewed, samples = capture.send(PROMPTS, concurrency=1, max_tokens=40)

    def correct(samples) -> tuple[int, int]:
        """Drafted tokens that the server accepted, and that the shadow would have."""
        shadow = [walk(draft, sample, embed_VD, NUM_DRAFT_STEPS) for sample in samples]
        live = sum(sum(sample.verify.num_correct) for sample in samples)
        return live, sum(sum(steps.num_correct) for steps in shadow)

    assert ack.is_ok
    assert served.control.request(GetStatus()).prefix_generation == before.prefix_generation + 1
    assert texts(stale) == texts(renewed)
    live, shadow = correct(stale_samples)
    assert live < shadow, "an untrained draft's KV costs nothing, so this shows nothing"
    assert samples[0].num_completed_rows == 0, "nothing of the first is shared with what was cached before"
    assert samples[-1].num_completed_rows > 0, "later ones share what it left"
    assert count_walked(draft, samples, embed_VD) > 20
