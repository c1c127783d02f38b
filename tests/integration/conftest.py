"""Servers shared by the integration tests: five boots in all, one server at a time.

Order of the modules: what needs the shared server first, the product's own boot last.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from onlinespec.draft.checkpoint import read_draft, write_draft
from onlinespec.draft.sample import Sample
from onlinespec.launch import read_launch
from onlinespec.operate import roll_back
from onlinespec.resolve import load_config
from onlinespec.versions.journal import Journal, Published
from onlinespec.versions.manifest import Provenance
from onlinespec.versions.state import state_of
from onlinespec.versions.store import VersionStore
from onlinespec.world import WORLD
from onlinespec.world.hf import AutoModelForCausalLM, AutoTokenizer
from tests.integration.capture import Capture
from tests.integration.learned import train_drafts
from tests.integration.servers import Server, free_port, send, start_ours, start_plain, world_prompts

NUM_IDENTITY_PROMPTS = 100
IDENTITY_TOKENS = 96
_ORDER = ("identity", "rows", "counters", "switchback", "prefixes", "updates", "variants", "battery", "watch")
_ORDER += ("product", "full", "drafts")
MODULES = [f"test_{name}" for name in _ORDER]


def pytest_collection_modifyitems(items) -> None:
    def place(item) -> int:
        name = item.path.stem
        return MODULES.index(name) if item.path.parent == Path(__file__).parent and name in MODULES else -1

    items.sort(key=place)


@pytest.fixture(scope="session")
def identity_prompts():
    return world_prompts(NUM_IDENTITY_PROMPTS, seed=11)


@pytest.fixture(scope="session")
def plain_answers(identity_prompts, tmp_path_factory) -> dict[str, str]:
    """Greedy answers of stock SGLang without speculation, by prompt text."""
    server = start_plain(tmp_path_factory.mktemp("plain"), free_port())
    try:
        answers = send(server, identity_prompts, max_tokens=IDENTITY_TOKENS)
    finally:
        server.stop()
    return {answer.prompt.messages[0]["content"]: answer.text for answer in answers}


@pytest.fixture(scope="session")
def served(tmp_path_factory, probe_plugin) -> Iterator[Server]:
    """`onlinespec serve` whose sidecar is left to the tests."""
    directory, environment = probe_plugin
    server = start_ours(
        tmp_path_factory.mktemp("served"),
        free_port(),
        sets=["supervisor.sidecar=false", "floor.enabled=true"],
        flags=["--chunked-prefill-size", "64"],
        environment=environment,
    )
    server.probe = directory
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def probe_plugin(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A second plugin beside ours, as a user may have one; see probe.py."""
    site, directory = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("probe")
    (site / "onlinespec_test_probe.py").write_text((Path(__file__).parent / "probe.py").read_text())
    info = site / "onlinespec_test_probe-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: onlinespec-test-probe\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nprobe = onlinespec_test_probe:register\n")
    return directory, {"PYTHONPATH": str(site), "PROBE_DIR": str(directory), "SGLANG_PLUGINS": "probe"}


@pytest.fixture(scope="session")
def capture(served) -> Iterator[Capture]:
    taken = Capture(served)
    taken.drain()
    yield taken
    taken.close()


def publish(server: Server, weights: dict[str, torch.Tensor], parent: int) -> int:
    """A version of a running server, not in service; its number."""
    launch = read_launch(server.paths.root)
    draft_config, _ = read_draft(server.paths.version(1))
    manifest = VersionStore(server.paths).publish(
        lambda folder: write_draft(folder, draft_config, weights),
        parent=parent,
        target_digest=launch.target_digest,
        provenance=Provenance(optimizer_steps=0, answer_tokens=0, seed=0, tenants=()),
        created_s=time.time(),
    )
    event = Published(time_s=time.time(), version=manifest.version, digest=manifest.digest, parent=parent)
    Journal(server.paths).append(event)
    return manifest.version


def learn(server: Server) -> None:
    """Put a draft that learned code in service, as version 2."""
    config = load_config([server.paths.resolved_config])
    (weights,) = train_drafts(*read_draft(server.paths.version(1)), [1], config.trainer)
    roll_back(server.paths.root, to=publish(server, weights, parent=1))


@pytest.fixture(scope="session")
def learned(served, capture) -> list[Sample]:
    """Of the draft before, while the one that learned is in service as version 2."""
    _, samples = capture.send(world_prompts(12, seed=5, domains=("code",)), max_tokens=60)
    learn(served)
    return samples


@pytest.fixture
def on_first_version(served, capture, learned):
    """The untrained draft in service. `capture` ends first: two receivers would share the samples between them."""
    capture.close()
    if state_of(Journal(served.paths).read()).incumbent != 1:
        roll_back(served.paths.root, to=1)


@pytest.fixture(scope="session")
def transformers_target():
    """The served target in transformers, with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(WORLD, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(WORLD)
