"""The version store: atomic publication, damage, retention, concurrent publishers, crashes."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from onlinespec.config import VersionsConfig
from onlinespec.errors import VersionError
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import Journal, Pinned, Promoted, Published, RolledBack, ServerStarted, TargetChanged
from onlinespec.versions.manifest import Provenance
from onlinespec.versions.state import JournalState, state_of
from onlinespec.versions.store import Incumbent, VersionStore

PROVENANCE = Provenance(optimizer_steps=30, answer_tokens=4000, seed=0, tenants=("a", "b"))

CHILD = """
import sys, time
from onlinespec.paths import RunPaths
from onlinespec.versions.manifest import Provenance
from onlinespec.versions.state import state_of
from onlinespec.versions.store import VersionStore

def publish(store, write_files):
    provenance = Provenance(optimizer_steps=1, answer_tokens=1, seed=0, tenants=())
    return store.publish(write_files, parent=None, target_digest="t", provenance=provenance, created_s=0.0)

store = VersionStore(RunPaths(sys.argv[1]))
"""
DYING = (
    CHILD
    + """
def write_files(directory):
    (directory / "model.safetensors").write_bytes(b"half a file")
    print("writing", flush=True)
    time.sleep(600)

publish(store, write_files)
"""
)
BUSY = (
    CHILD
    + """
for number in range(15):
    text = f"{sys.argv[2]} {number}".encode()
    print(publish(store, lambda path: (path / "model.safetensors").write_bytes(text)).version, flush=True)
"""
)

FULL_DISK = (
    CHILD
    + """
import resource, signal
import torch
from safetensors.torch import save_file
from onlinespec.errors import VersionError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    publish(store, lambda path: save_file({"a": torch.zeros(10_000)}, path / "model.safetensors"))
except VersionError as error:
    print(error)
"""
)


@pytest.fixture
def paths(tmp_path):
    return RunPaths(tmp_path / "run")


def publish(store, weights=b"weights", parent=None, target_digest="target", config="{}", **others):
    def write_files(directory):
        (directory / "model.safetensors").write_bytes(weights)
        (directory / "config.json").write_text(config)

    return store.publish(
        write_files,
        parent=parent,
        target_digest=target_digest,
        provenance=PROVENANCE,
        created_s=12.5,
        **others,
    )


def test_a_published_version_says_what_it_is(paths):
    store = VersionStore(paths)
    first = publish(store)
    second = publish(store, b"better", parent=1, verdict={"decision": "promote"})

    assert (first.version, second.version) == (1, 2)
    assert second.digest == hashlib.sha256(b"better").hexdigest()
    assert (second.parent, second.parent_digest) == (1, first.digest)
    assert store.manifest(2) == second == store.verify(2)
    assert store.numbers() == (1, 2)
    assert store.latest() == 2
    assert sorted(os.listdir(paths.version(2))) == ["config.json", "manifest.json", "model.safetensors"]


def test_the_manifest_on_disk_is_indented_json(paths):
    publish(VersionStore(paths))

    text = (paths.version(1) / "manifest.json").read_text()

    assert '\n  "version": 1,' in text
    assert json.loads(text)["provenance"]["tenants"] == ["a", "b"]


def test_an_empty_store_has_no_versions(paths):
    store = VersionStore(paths)

    assert store.numbers() == ()
    assert store.latest() is None
    assert store.retain(VersionsConfig(), JournalState()).versions == ()
    assert not paths.root.exists()


def test_a_version_that_is_not_there_is_an_error_that_says_what_is(paths):
    store = VersionStore(paths)
    publish(store)

    with pytest.raises(VersionError, match=r"version 7 is not in .*it holds 1"):
        store.manifest(7)
    with pytest.raises(VersionError, match="version 7"):
        publish(store, parent=7)


def test_changed_weights_do_not_verify(paths):
    store = VersionStore(paths)
    manifest = publish(store)
    (paths.version(1) / "model.safetensors").write_bytes(b"weighty")

    with pytest.raises(VersionError, match=manifest.digest):
        store.verify(1)


def test_missing_weights_do_not_verify(paths):
    store = VersionStore(paths)
    publish(store)
    (paths.version(1) / "model.safetensors").unlink()

    with pytest.raises(VersionError, match=r"model\.safetensors"):
        store.verify(1)


@pytest.mark.parametrize("text", ["{", "{}", '{"version": "one"}'])
def test_a_damaged_manifest_is_an_error_that_names_the_file(paths, text):
    store = VersionStore(paths)
    publish(store)
    (paths.version(1) / "manifest.json").write_text(text)

    with pytest.raises(VersionError, match=r"manifest\.json"):
        store.manifest(1)


def test_a_manifest_of_another_number_is_refused(paths):
    store = VersionStore(paths)
    publish(store)
    paths.version(1).rename(paths.version(5))

    with pytest.raises(VersionError, match="says version 1"):
        store.manifest(5)


def test_a_writer_that_raises_leaves_the_store_as_it_was(paths):
    store = VersionStore(paths)
    publish(store)

    def fail(directory):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(VersionError, match="No space left"):
        store.publish(fail, parent=None, target_digest="t", provenance=PROVENANCE, created_s=0.0)
    with pytest.raises(ZeroDivisionError):
        store.publish(lambda _: 1 / 0, parent=None, target_digest="t", provenance=PROVENANCE, created_s=0.0)

    assert sorted(os.listdir(paths.versions)) == [".lock", "000001"]


def test_a_version_without_weights_is_refused(paths):
    store = VersionStore(paths)

    with pytest.raises(VersionError, match=r"no model\.safetensors"):
        store.publish(lambda _: None, parent=None, target_digest="t", provenance=PROVENANCE, created_s=0.0)

    assert store.numbers() == ()


def test_a_publisher_killed_in_the_middle_leaves_nothing_but_what_the_next_open_removes(paths):
    publish(VersionStore(paths))
    child = subprocess.Popen([sys.executable, "-c", DYING, str(paths.root)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"

    # While it lives, others open the store and publish, and leave its work alone.
    assert publish(VersionStore(paths)).version == 2
    assert len(list(paths.versions.glob(".publishing-*"))) == 1

    child.send_signal(signal.SIGKILL)
    child.wait(30)
    child.stdout.close()
    assert len(list(paths.versions.glob(".publishing-*"))) == 1
    store = VersionStore(paths)

    assert list(paths.versions.glob(".publishing-*")) == []
    assert store.numbers() == (1, 2)
    assert publish(store).version == 3


def test_concurrent_publishers_get_different_numbers(paths):
    children = [
        subprocess.Popen([sys.executable, "-c", BUSY, str(paths.root), name], stdout=subprocess.PIPE, text=True)
        for name in ("one", "two")
    ]

    outputs = [child.communicate(timeout=60)[0] for child in children]

    numbers = [[int(line) for line in output.split()] for output in outputs]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(numbers[0] + numbers[1]) == list(range(1, 31))
    store = VersionStore(paths)
    for name, versions in zip(("one", "two"), numbers, strict=True):
        for count, version in enumerate(versions):
            assert store.verify(version).version == version
            assert (paths.version(version) / "model.safetensors").read_text() == f"{name} {count}"


def test_retention_keeps_the_newest_milestones_and_the_protected(paths):
    store = VersionStore(paths)
    for _ in range(6):
        publish(store)
    state = JournalState(incumbent=2, previous=99, promoted=(1, 3, 4, 5))

    deletion = store.retain(VersionsConfig(keep_last=2, milestone_every=2, min_free_bytes=0), state)

    assert deletion.versions == (1, 4)
    assert deletion.notice is None
    assert store.numbers() == (2, 3, 5, 6)
    assert publish(store).version == 7


def test_a_disk_without_room_keeps_only_what_is_protected_and_says_so(paths):
    store = VersionStore(paths)
    for _ in range(4):
        publish(store)

    deletion = store.retain(VersionsConfig(min_free_bytes=2**62), JournalState(incumbent=2), also={4})

    assert (deletion.for_room, store.numbers()) == ((1, 3), (2, 4))
    assert re.fullmatch(
        r"[\d.]+ GiB of disk are free, versions.min_free_bytes wants 4294967296.00 GiB; versions deleted: 1, 3;"
        r" free now: [\d.]+ GiB; make room on that disk",
        deletion.notice,
    )


def test_weights_that_a_full_disk_cuts_short_are_one_error_and_leave_the_store_as_it_was(paths):
    publish(VersionStore(paths), b"small")

    # A file size limit makes the kernel cut the write short, as a full disk does.
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(paths.root)], capture_output=True, text=True, check=True
    )

    assert re.fullmatch(r".*/\.publishing-\S+: nothing was published .*; check the disk\n", child.stdout)
    assert sorted(os.listdir(paths.versions)) == [".lock", "000001"]


def test_a_removal_that_a_crash_cut_short_is_finished_by_the_next_open(paths):
    publish(VersionStore(paths))
    publish(VersionStore(paths))
    paths.version(1).rename(paths.versions / ".removing-000001")

    store = VersionStore(paths)

    assert store.numbers() == (2,)
    assert sorted(os.listdir(paths.versions)) == [".lock", "000002"]


def test_a_restart_resumes_from_the_journals_incumbent(paths):
    store, journal = VersionStore(paths), Journal(paths)
    publish(store)
    publish(store, b"better", parent=1)
    assert store.incumbent_for("target") is None

    journal.append(ServerStarted(time_s=1.0, version=1))
    journal.append(Promoted(time_s=2.0, version=2, from_version=1, by="gate"))

    assert store.incumbent_for("target") == Incumbent(store.manifest(2))


def test_an_incumbent_of_another_target_is_refused_with_both_digests_and_the_way_out(paths):
    store = VersionStore(paths)
    publish(store, target_digest="old-target")
    Journal(paths).append(ServerStarted(time_s=1.0, version=1))

    with pytest.raises(VersionError, match=r"old-target.*new-target.*new run directory"):
        store.incumbent_for("new-target")


def test_an_incumbent_that_served_when_the_target_changed_is_one_of_the_new_target_too(paths):
    store, journal = VersionStore(paths), Journal(paths)
    publish(store, target_digest="old")
    journal.append(ServerStarted(time_s=1.0, version=1))
    journal.append(TargetChanged(time_s=2.0, from_digest="old", to_digest="new"))

    assert store.incumbent_for("new") == store.incumbent_for("old") == Incumbent(store.manifest(1))
    with pytest.raises(VersionError, match="trained for target old"):
        store.incumbent_for("other")


def test_what_was_learned_on_an_update_that_a_restart_undoes_gives_way_to_what_was_in_service_then(paths):
    paths.create()
    store, journal = VersionStore(paths), Journal(paths)
    journal.append(ServerStarted(time_s=1.0, version=1))
    for version, target in enumerate(("files", "files", "files+1", "files+2"), start=1):
        parent = version - 1 or None
        digest = publish(store, f"weights {version}".encode(), parent=parent, target_digest=target).digest
        if target != "files":
            journal.append(TargetChanged(time_s=2.0, from_digest="files", to_digest=target, num_updates=version))
        journal.append(Published(time_s=3.0, version=version, digest=digest, parent=parent))
        journal.append(Promoted(time_s=3.0, version=version, from_version=parent, by="gate"))

    incumbent = store.incumbent_for("files")

    assert (incumbent.manifest.version, incumbent.instead_of) == (2, 4)
    assert "version 4 was trained for target files+2" in incumbent.reason
    assert 2 in state_of(journal.read()).protected
    assert store.incumbent_for("files+2").manifest.version == 4
    journal.append(TargetChanged(time_s=9.0, from_digest="files+2", to_digest="files"))
    assert state_of(journal.read()).updated_from is None


@pytest.fixture
def lineage(paths):
    """A store whose version 3 was trained from 2, 2 from 1; 3 is in service."""
    paths.create()
    store, journal = VersionStore(paths), Journal(paths)
    journal.append(ServerStarted(time_s=1.0, version=1))
    for version in (1, 2, 3):
        parent = version - 1 or None
        digest = publish(store, f"weights {version}".encode(), parent=parent).digest
        journal.append(Published(time_s=1.0, version=version, digest=digest, parent=parent))
        journal.append(Promoted(time_s=2.0, version=version, from_version=parent, by="gate"))
    return store


def damage(paths, version):
    (paths.version(version) / "model.safetensors").write_bytes(b"x")


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (lambda path: (path / "model.safetensors").write_bytes(b"x"), "the file is damaged"),
        (lambda path: (path / "manifest.json").unlink(), "cannot be read"),
        (lambda path: path.rename(path.with_name("gone")), "version 3 is not in"),
    ],
)
def test_a_damaged_incumbent_gives_way_to_its_newest_undamaged_ancestor(paths, lineage, spoil, found):
    spoil(paths.version(3))

    incumbent = lineage.incumbent_for("target")

    assert (incumbent.manifest.version, incumbent.instead_of) == (2, 3)
    assert found in incumbent.reason

    damage(paths, 2)
    assert lineage.incumbent_for("target").manifest.version == 1


def test_an_ancestor_of_another_target_or_under_a_bar_is_passed_over(paths):
    store, journal = VersionStore(paths), Journal(paths)
    digests = [publish(store, b"1").digest]
    digests += [
        publish(store, text, parent=number, target_digest=target).digest
        for number, (text, target) in enumerate([(b"2", "target"), (b"3", "other"), (b"4", "target")], start=1)
    ]
    for version, digest in enumerate(digests, start=1):
        journal.append(Published(time_s=1.0, version=version, digest=digest, parent=version - 1 or None))
    journal.append(ServerStarted(time_s=2.0, version=4))
    damage(paths, 4)

    assert store.incumbent_for("target").manifest.version == 2
    rolled_back = RolledBack(time_s=3.0, from_version=2, to_version=4, by="guard", barred_digest=digests[1])
    journal.append(rolled_back)

    assert store.incumbent_for("target").manifest.version == 1


def test_where_nothing_undamaged_is_left_the_error_names_every_way_out(paths, lineage):
    for version in (1, 2, 3):
        damage(paths, version)

    with pytest.raises(VersionError, match=r"000003.*damaged.*restore it.*`onlinespec promote N`.*new run directory"):
        lineage.incumbent_for("target")


def test_a_damaged_pin_is_an_error_that_names_unpin(paths, lineage):
    Journal(paths).append(Pinned(time_s=3.0, version=3))
    damage(paths, 3)

    with pytest.raises(VersionError, match=r"version 3 is pinned .*damaged.*`onlinespec unpin`"):
        lineage.incumbent_for("target")


@pytest.mark.parametrize(
    ("changes", "is_reused"),
    [({}, True), ({"target_digest": "other"}, False), ({"weights": b"others"}, False), ({"config": "{ }"}, False)],
)
def test_the_same_bytes_for_the_same_target_may_be_reused(paths, changes, is_reused):
    store = VersionStore(paths)
    first = publish(store)

    second = publish(store, may_reuse=True, **changes)

    assert (second == first) == is_reused
    assert store.numbers() == ((1,) if is_reused else (1, 2))


def test_a_damaged_version_is_not_reused(paths):
    store = VersionStore(paths)
    publish(store)
    damage(paths, 1)

    assert publish(store, may_reuse=True).version == 2


def test_an_incumbent_that_is_gone_is_an_error(paths):
    store = VersionStore(paths)
    publish(store)
    Journal(paths).append(ServerStarted(time_s=1.0, version=4))

    with pytest.raises(VersionError, match="version 4 is not in"):
        store.incumbent_for("target")
