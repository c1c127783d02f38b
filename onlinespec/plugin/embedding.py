"""The target's embedding table out of the server: after a weight update no file has it.

The copy is made on the scheduler's thread, between two forward passes; it is written in a thread of its own.
"""

import threading
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from onlinespec.errors import SwapError
from onlinespec.wire.messages import EMBEDDING_TENSOR, ExportEmbedding


class EmbeddingExport:
    """One rank's part of it."""

    def __init__(self) -> None:
        self._writing: threading.Thread | None = None
        self._error = ""

    def begin(self, request: ExportEmbedding, embedding: Any) -> None:
        """On the scheduler's thread. embedding: SGLang 0.5.23 layers/vocab_parallel_embedding.py
        VocabParallelEmbedding, of which this rank holds consecutive rows, padding behind them."""
        start, end = 0, len(embedding.weight)
        if (shard := getattr(embedding, "shard_indices", None)) is not None:
            start, end = shard.org_vocab_start_index, shard.org_vocab_end_index
        rows_nD = embedding.weight.detach()[: end - start].to("cpu", copy=True)
        file = Path(request.directory) / f"{start:010d}.safetensors"
        self._error = ""
        self._writing = threading.Thread(
            target=self._write, args=(rows_nD, file), name="onlinespec-export", daemon=True
        )
        self._writing.start()

    def _write(self, rows_nD: torch.Tensor, file: Path) -> None:
        try:
            save_file({EMBEDDING_TENSOR: rows_nD}, file)
        except (OSError, SafetensorError) as error:  # safetensors does not tell a full disk as an OSError
            self._error = f"{file}: {error}"

    def wait(self) -> None:
        """Until this rank's rows are written. Raises: SwapError where they were not."""
        if self._writing is not None:
            self._writing.join()
        if self._error:
            raise SwapError(f"the embedding table was not written: {self._error}; check the disk")
