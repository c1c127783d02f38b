"""The draft to begin with, as `--draft` names it: a directory, `init` for a fresh one, `init:CONFIG` for a fresh
one in the shape of a draft's config."""

from pathlib import Path

import torch

from onlinespec.draft.checkpoint import read_draft
from onlinespec.draft.config import DraftConfig, read_draft_config, read_target
from onlinespec.draft.fresh import build_fresh_draft, fresh_config
from onlinespec.draft.header import check_draft
from onlinespec.draft.tokenizer import check_tokenizer

FRESH = "init"
_IN_SHAPE = "init:"


def is_fresh(draft: str) -> bool:
    """Whether `--draft` asks for an untrained one."""
    return draft == FRESH or draft.startswith(_IN_SHAPE)


def _shape(draft: str) -> str | None:
    return draft.removeprefix(_IN_SHAPE) if draft.startswith(_IN_SHAPE) else None


def read_start(
    draft: str, target: Path, seed: int, context_tokens: int | None = None
) -> tuple[DraftConfig, dict[str, torch.Tensor]]:
    """Config and weights, ready for `write_draft`, once they fit the target.

    seed: of a fresh draft. context_tokens: longest sequence served; None means the target's own limit.

    Raises: CheckpointError where the draft is damaged, or does not fit the target or its tokenizer.
    """
    if is_fresh(draft):
        return build_fresh_draft(target, seed, _shape(draft), context_tokens)
    check_draft(draft, read_target(target), context_tokens)
    check_tokenizer(draft, target)
    return read_draft(draft)


def read_start_config(draft: str, target: Path) -> DraftConfig:
    """The config alone. Raises: CheckpointError."""
    if draft == FRESH:
        return fresh_config(read_target(target), target)
    return read_draft_config(_shape(draft) or draft)
