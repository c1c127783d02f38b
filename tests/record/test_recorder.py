"""A recording gives back what was put in, in order, stays below its bound, and is refused where it is damaged."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import msgspec
import pytest
import torch

from onlinespec.draft.sample import Sample, VerifySteps
from onlinespec.errors import RecordError
from onlinespec.record.manifest import MANIFEST_FILE, RowFacts, read_manifest
from onlinespec.record.reader import Recording
from onlinespec.record.recorder import Recorder
from tests.draft.tiny import build_sample

FACTS = RowFacts(target_digest="aa", hidden_size=16, aux_layers=(2, 4, 5), teacher_top_k=4)
MEGABYTE = 10**6


def recorder(path: Path, facts: RowFacts = FACTS, source: str = "server", **changes: int) -> Recorder:
    sizes = {"shard_bytes": 10_000, "max_bytes": MEGABYTE} | changes
    return Recorder(path, facts, source, created_s=1.0, **sizes)


def sample(seed: int, **changes) -> Sample:
    """One with holes, whose values where nothing was captured are zero, as the assembler leaves them."""
    built = build_sample(seed, num_prompt=3 + seed % 4, num_answer=5 + seed % 7, temperature=0.1 * seed)
    has_aux_T = built.has_aux_T & (torch.arange(built.num_tokens) != 1)
    taught_T1 = built.has_teacher_T[:, None]
    return replace(
        built,
        tenant=f"tenant {seed % 3}",
        aux_TA=built.aux_TA * has_aux_T[:, None],
        has_aux_T=has_aux_T,
        teacher_ids_Tk=built.teacher_ids_Tk * taught_T1,
        teacher_logits_Tk=built.teacher_logits_Tk * taught_T1,
        teacher_lse_T=built.teacher_lse_T * built.has_teacher_T,
        verify=VerifySteps([4, 6], [3, 3], [1, 0], [2, 1], [7, 7], [False, True]),
        started_s=1.1 * seed,
        ended_s=1.7 * seed,
        group=bytes([seed] * 16),
        **changes,
    )


def record(path: Path, samples: list[Sample], **changes: int) -> list[bool]:
    into = recorder(path, **changes)
    taken = [into.add(item) for item in samples]
    into.close()
    return taken


def assert_equal(found: Sample, wanted: Sample) -> None:
    for field in fields(Sample):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype, field.name
            assert torch.equal(one, other), field.name
        else:
            assert one == other, field.name


@contextmanager
def no_big_files() -> Iterator[None]:
    """The kernel refuses to let a file grow beyond 20_000 bytes. No longer than needed: pytest writes files too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_samples_come_back_exactly_and_in_order_over_several_shards(tmp_path: Path):
    samples = [sample(seed) for seed in range(20)]

    record(tmp_path / "r", samples)

    found = Recording(tmp_path / "r")
    assert len(found.manifest.shards) > 2
    for one, other in zip(found, samples, strict=True):
        assert_equal(one, other)
    assert len(found) == 20
    assert found.manifest.tenants == ("tenant 0", "tenant 1", "tenant 2")
    assert found.manifest.num_tokens == sum(item.num_tokens for item in samples)


def test_rows_of_a_bfloat16_server_take_half_the_room_and_lose_nothing(tmp_path: Path):
    wide = [sample(seed) for seed in range(6)]
    rounded = [replace(item, aux_TA=item.aux_TA.bfloat16().float()) for item in wide]

    record(tmp_path / "wide", wide, shard_bytes=MEGABYTE)
    record(tmp_path / "rounded", rounded, shard_bytes=MEGABYTE)

    num_values = sum(int(item.has_aux_T.sum()) * item.aux_TA.shape[1] for item in wide)
    sizes = [Recording(tmp_path / name).manifest.num_bytes for name in ("wide", "rounded")]
    assert sizes[0] - sizes[1] == pytest.approx(2 * num_values, abs=100)
    for one, other in zip(Recording(tmp_path / "rounded"), rounded, strict=True):
        assert_equal(one, other)


def test_a_sample_that_is_kept_does_not_keep_its_shard(tmp_path: Path):
    record(tmp_path / "r", [sample(seed) for seed in range(20)])

    first = next(iter(Recording(tmp_path / "r")))

    assert first.aux_TA.untyped_storage().nbytes() == first.aux_TA.nbytes


def test_directory_and_files_are_their_owners_only(tmp_path: Path):
    (tmp_path / "r").mkdir(mode=0o755)

    record(tmp_path / "r", [sample(0)])

    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "r").iterdir()} == {0o600}
    assert {path.name for path in (tmp_path / "r").iterdir()} == {MANIFEST_FILE, "shard-000001.safetensors"}


@pytest.mark.parametrize("shard_bytes", [1, 10_000, MEGABYTE])
def test_the_directory_never_outgrows_its_bound_and_says_when_it_is_full(tmp_path: Path, shard_bytes: int):
    samples = [sample(seed) for seed in range(60)]

    taken = record(tmp_path / "r", samples, max_bytes=60_000, shard_bytes=shard_bytes)
    again = record(tmp_path / "r", samples, max_bytes=60_000, shard_bytes=shard_bytes)

    num_taken = taken.index(False)
    sizes = [path.stat().st_size for path in (tmp_path / "r").iterdir()]
    assert 60_000 * (0.5 if shard_bytes > 1 else 0.3) < sum(sizes) <= 60_000
    assert len(Recording(tmp_path / "r")) == sum(taken) + sum(again)
    assert num_taken > 3
    assert sum(again) < num_taken


def test_a_recording_goes_on_where_it_stopped(tmp_path: Path):
    record(tmp_path / "r", [sample(0)])
    orphan = tmp_path / "r" / "shard-000002.safetensors"
    orphan.write_bytes(b"renamed, then the power went")

    with pytest.raises(RecordError, match=r"shard-000002\.safetensors: not in the manifest"):
        Recording(tmp_path / "r")
    record(tmp_path / "r", [sample(1)])

    assert [item.request for item in Recording(tmp_path / "r")] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_digest": "bb"}, "its rows have target_digest aa, wanted bb"),
        ({"aux_layers": (1, 2, 3)}, r"its rows have aux_layers \[2, 4, 5\], wanted \[1, 2, 3\]"),
        ({"teacher_top_k": 8}, "its rows have teacher_top_k 4, wanted 8"),
    ],
)
def test_rows_of_another_kind_are_not_mixed_in(tmp_path: Path, changes: dict, told: str):
    record(tmp_path / "r", [sample(0)])

    with pytest.raises(RecordError, match=told):
        recorder(tmp_path / "r", facts=msgspec.structs.replace(FACTS, **changes))
    into = recorder(tmp_path / "r")  # the refused one has let go
    with pytest.raises(RecordError, match="rows of 48 values with 5 teacher logits, its recording 48 with 4"):
        into.add(build_sample(0, top_k=5))
    into.add(sample(1))
    into.close()

    assert [item.request for item in Recording(tmp_path / "r")] == [0, 1]


def test_a_directory_of_something_else_or_in_use_is_left_alone(tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    held = recorder(tmp_path / "r")

    with pytest.raises(RecordError, match="home: holds files and no recording"):
        recorder(tmp_path / "home")
    with pytest.raises(RecordError, match="another process is recording into it"):
        recorder(tmp_path / "r")

    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    held.close()


def test_a_disk_that_refuses_leaves_what_was_written_before_readable(tmp_path: Path):
    into = recorder(tmp_path / "r", shard_bytes=15_000)
    while not into.manifest.shards:
        into.add(sample(into.num_samples))
    written, written_bytes = into.num_samples, into.num_bytes
    into._shard_bytes = MEGABYTE
    while into.num_bytes < written_bytes + 25_000:
        into.add(sample(into.num_samples))

    with no_big_files(), pytest.raises(OSError, match="File too large"):
        into.flush()
    into.abandon()

    assert len(list(Recording(tmp_path / "r"))) == written
    assert {path.name for path in (tmp_path / "r").iterdir()} == {MANIFEST_FILE, "shard-000001.safetensors"}


def damage_truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-10])


def damage_flip(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_truncate, "truncated: found"),
        (damage_flip, "its digest is"),
        (lambda shard: shard.unlink(), "missing: found 0 bytes"),
        (lambda shard: shard.write_bytes(shard.read_bytes() + b"x"), "too long"),
        (lambda shard: shard.with_name("shard-000009.safetensors").write_bytes(b"x"), "not in the manifest"),
        (lambda shard: shard.write_bytes(shard.with_name("shard-000001.safetensors").read_bytes()), "000002"),
    ],
)
def test_a_damaged_or_foreign_shard_is_refused_by_its_name(tmp_path: Path, damage, told: str):
    record(tmp_path / "r", [sample(seed) for seed in range(20)])
    damage(tmp_path / "r" / "shard-000002.safetensors")

    with pytest.raises(RecordError, match=told) as caught:
        list(Recording(tmp_path / "r"))

    assert "/shard-00000" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [("{}", "format_version is None"), ('{"format_version": 2}', "format_version is 2"), ("[", "no manifest")],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, text: str, told: str):
    (tmp_path / MANIFEST_FILE).write_text(text)

    with pytest.raises(RecordError, match=told):
        Recording(tmp_path)
    with pytest.raises(RecordError, match=r"absent/manifest\.json: No such file"):
        Recording(tmp_path / "absent")


def test_the_digest_of_a_recording_changes_with_any_row(tmp_path: Path):
    record(tmp_path / "a", [sample(0), sample(1)])
    record(tmp_path / "b", [sample(0), sample(1)])
    record(tmp_path / "c", [sample(0), replace(sample(1), teacher_lse_T=2 * sample(1).teacher_lse_T)])

    digests = [Recording(tmp_path / name).digest for name in "abc"]

    assert digests[0] == digests[1] != digests[2]
    assert read_manifest(tmp_path / "a").created_s == 1.0
