"""The target's embedding table out of the server: after a weight update no file has it.

The scheduler's thread only marks where its stream is; a thread of ours copies the table from there on and writes it.
It goes through a few megabytes of pinned memory: as much as a table would stop the device while it is taken, and
torch would keep it. The next update of the weights waits for the copy, so what is written is one table.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from onlinespec.errors import NotYetError, SwapError
from onlinespec.plugin.device import Device, Event
from onlinespec.wire.messages import EMBEDDING_TENSOR, ExportEmbedding

_PART_BYTES = 16 * 2**20


class EmbeddingExport:
    """One rank's part of it."""

    def __init__(self) -> None:
        self._writing: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._error = ""

    def begin(self, request: ExportEmbedding, embedding: Any, device: Device) -> None:
        """On the scheduler's thread. embedding: SGLang 0.5.23 layers/vocab_parallel_embedding.py
        VocabParallelEmbedding, of which this rank holds consecutive rows, padding behind them."""
        start, end = 0, len(embedding.weight)
        if (shard := getattr(embedding, "shard_indices", None)) is not None:
            start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        rows_nD = embedding.weight.detach()[: end - start]
        file = Path(request.directory) / f"{start:010d}.safetensors"
        self._error = "the thread that copies it broke off, the log says why"
        self._copied.clear()
        self._writing = threading.Thread(
            target=self._write, args=(rows_nD, file, device, device.mark()), name="onlinespec-export", daemon=True
        )
        self._writing.start()

    def _write(self, rows_nD: torch.Tensor, file: Path, device: Device, asked: Event) -> None:
        try:
            on_host_nD = _copy(rows_nD, device, asked)
        finally:
            self._copied.set()
        try:
            save_file({EMBEDDING_TENSOR: on_host_nD}, file)
        except (OSError, SafetensorError) as error:  # safetensors does not tell a full disk as an OSError
            self._error = f"{file}: {error}; check the disk"
        else:
            self._error = ""

    def wait_copied(self) -> None:
        """On the scheduler's thread, before the table changes: until the copy under way has all of it."""
        self._copied.wait()

    def wait_written(self) -> None:
        """Until this rank's rows are written, or could not be; never on the scheduler's thread."""
        if self._writing is not None:
            self._writing.join()

    def expect_written(self, agree: Callable[[bool], bool]) -> None:
        """On every rank at the same iteration. agree: whether a statement holds on all of them.

        Raises, on all of them: NotYetError while one is still writing, SwapError where one could not.
        """
        if not agree(self._writing is None or not self._writing.is_alive()):
            raise NotYetError("the embedding table is still being written")
        if not agree(not self._error):
            said = self._error or "another rank could not write its part; see its log"
            raise SwapError(f"the embedding table was not written: {said}")


def _copy(rows_nD: torch.Tensor, device: Device, after: Event) -> torch.Tensor:
    """To the host, behind that event. Shapes: [n, D]."""
    num_rows = max(1, _PART_BYTES // (rows_nD.shape[1] * rows_nD.element_size()))
    part_mD = device.pinned((min(num_rows, len(rows_nD)), rows_nD.shape[1]), rows_nD.dtype)
    on_host_nD = torch.empty(rows_nD.shape, dtype=rows_nD.dtype)
    for source, destination in zip(rows_nD.split(num_rows), on_host_nD.split(num_rows), strict=True):
        arrived = part_mD[: len(source)]
        device.copy_aside([(arrived, source)], after=after).wait()
        destination.copy_(arrived)
    return on_host_nD
