"""The target as the server has it now. Its weights may be updated while it serves (SGLang's weight update calls).

Of the target the trainer and the shadow read one tensor, the embedding table, which the server's draft shares with
it; the teacher's logits come with the rows. After an update no file holds that table, so the server writes it out.
"""

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from onlinespec.draft.fresh import read_embedding
from onlinespec.wire.messages import EMBEDDING_TENSOR, ExportEmbedding, GetStatus, Status
from onlinespec.wire.sockets import ControlClient


class ServedTarget:
    """embed_VD, [V, D] in the dtype of its file, is replaced in place: whoever holds it reads what the server has.

    exported: a directory of ours, made and removed again for each export.
    Raises: CheckpointError where no file of `model` holds the table.
    """

    def __init__(self, model: str, exported: Path, control: ControlClient):
        self.embed_VD = read_embedding(model)
        self.num_updates = 0
        """updates since the server's start that embed_VD is of"""
        self.missing = ""
        """why embed_VD is of an older target; empty where it is not"""
        self._exported = exported
        self._control = control
        status = control.request(GetStatus())
        assert isinstance(status, Status), status
        if status.target_updates:
            self.follow(status.target_updates)

    def follow(self, num_updates: int) -> None:
        """Read the table anew, as it is after this update or a later one. `missing` says where that failed."""
        self.num_updates = num_updates
        shutil.rmtree(self._exported, ignore_errors=True)
        self._exported.mkdir(mode=0o700)
        ack = self._control.acknowledged(ExportEmbedding(str(self._exported)))
        self.missing = self._read() if ack.is_ok else ack.message
        shutil.rmtree(self._exported, ignore_errors=True)

    def _read(self) -> str:
        """Into embed_VD. What was wrong; empty where nothing was."""
        files = sorted(self._exported.glob("*.safetensors"))
        try:
            parts = [load_file(file)[EMBEDDING_TENSOR] for file in files]
        except (OSError, SafetensorError, KeyError) as error:
            return f"the exported table cannot be read: {error}"
        rows, widths = sum(len(part) for part in parts), {part.shape[1] for part in parts}
        wanted = tuple(self.embed_VD.shape)
        if (rows, widths) != (wanted[0], {wanted[1]}):
            return (
                f"the exported table has {rows} rows of width {sorted(widths)}, its model's config.json says {wanted}"
            )
        self.embed_VD.copy_(torch.cat(parts))
        return ""
