"""The target's table leaves as it was when it was asked for, and no scheduler waits for it."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from onlinespec.errors import NotYetError, SwapError
from onlinespec.plugin import embedding
from onlinespec.plugin.embedding import EmbeddingExport
from onlinespec.wire.messages import EMBEDDING_TENSOR, ExportEmbedding
from tests.plugin.late import LateDevice

TABLE_VD = torch.arange(42.0).view(7, 6)


@pytest.fixture(autouse=True)
def parts_of_two_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "_PART_BYTES", 2 * TABLE_VD[:1].nbytes + 1)


@pytest.fixture
def device() -> LateDevice:
    return LateDevice()


def build_layer(**changes) -> SimpleNamespace:
    return SimpleNamespace(weight=torch.nn.Parameter(TABLE_VD.clone()), **changes)


def finish(export: EmbeddingExport) -> None:
    export.wait_written()
    export.expect_written(bool)


def written(directory: Path) -> dict[str, torch.Tensor]:
    return {file.name: load_file(file)[EMBEDDING_TENSOR] for file in directory.iterdir()}


def test_what_was_on_its_way_into_the_table_when_it_was_asked_for_is_written(tmp_path: Path, device: LateDevice):
    export, layer = EmbeddingExport(), build_layer()
    device.copy([layer.weight.data], [TABLE_VD + 100])

    export.begin(ExportEmbedding(str(tmp_path)), layer, device)
    finish(export)

    assert torch.equal(written(tmp_path)["0000000000.safetensors"], TABLE_VD + 100)
    assert threading.get_ident() not in device.waiters, "the scheduler's thread has waited"
    assert device.num_pinned_bytes == 2 * TABLE_VD[:1].nbytes, "of a table that may be larger than what is pinned"


def test_a_rank_writes_its_own_rows_without_padding_under_the_number_of_the_first(tmp_path: Path, device: LateDevice):
    shard = SimpleNamespace(org_vocab_start_index=20, org_vocab_end_index=25)
    export = EmbeddingExport()

    export.begin(ExportEmbedding(str(tmp_path)), build_layer(shard_indices=shard), device)
    finish(export)

    (rows,) = written(tmp_path).items()
    assert rows[0] == "0000000020.safetensors"
    assert torch.equal(rows[1], TABLE_VD[:5])


def test_an_update_of_the_table_waits_until_the_copy_has_all_of_it(tmp_path: Path, device: LateDevice):
    export, layer, may_go_on = EmbeddingExport(), build_layer(), threading.Event()
    finish_work = device.finish
    device.finish = lambda work: (may_go_on.wait(), finish_work(work))
    export.begin(ExportEmbedding(str(tmp_path)), layer, device)
    threading.Timer(0.1, may_go_on.set).start()

    export.wait_copied()
    layer.weight.data.zero_()
    finish(export)

    assert torch.equal(written(tmp_path)["0000000000.safetensors"], TABLE_VD)


def test_no_schedulers_thread_waits_for_a_rank_that_still_writes(tmp_path: Path, device: LateDevice):
    export, may_go_on, heard = EmbeddingExport(), threading.Event(), []
    finish_work = device.finish
    device.finish = lambda work: (may_go_on.wait(), finish_work(work))
    export.begin(ExportEmbedding(str(tmp_path)), build_layer(), device)

    with pytest.raises(NotYetError, match="still being written"):
        export.expect_written(lambda is_so: heard.append(is_so))
    may_go_on.set()
    export.wait_written()
    with pytest.raises(SwapError, match="another rank could not write its part"):
        export.expect_written(lambda is_so: heard.append(is_so) or len(heard) == 2)

    assert heard == [False, True, True]


def test_a_table_that_cannot_be_written_is_refused_by_its_path_and_the_next_one_is_written(
    tmp_path: Path, device: LateDevice
):
    export, gone = EmbeddingExport(), tmp_path / "gone"

    export.begin(ExportEmbedding(str(gone)), build_layer(), device)
    with pytest.raises(SwapError, match=rf"not written: {gone}/0000000000.safetensors: .*; check the disk"):
        finish(export)
    export.begin(ExportEmbedding(str(tmp_path)), build_layer(), device)
    finish(export)

    assert torch.equal(written(tmp_path)["0000000000.safetensors"], TABLE_VD)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_copy_that_breaks_off_is_refused_and_holds_up_no_update(tmp_path: Path, device: LateDevice):
    def fail(_work) -> None:
        raise RuntimeError("device gone")

    export, device.finish = EmbeddingExport(), fail
    export.begin(ExportEmbedding(str(tmp_path)), build_layer(), device)

    export.wait_copied()
    with pytest.raises(SwapError, match="the thread that copies it broke off"):
        finish(export)

    assert written(tmp_path) == {}
