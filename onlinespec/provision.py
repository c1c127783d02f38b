"""Chooses the draft a server starts with, and makes it version 1 of a new run directory.

A run directory that has promoted before resumes on its incumbent; `--draft` then only says where it began.
Everything about the target and the draft that can be refused is refused here, before SGLang is imported;
a fresh draft needs torch, a given one is judged by its header first.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from onlinespec.config import TrainerConfig
from onlinespec.draft.checkpoint import write_draft
from onlinespec.draft.config import DraftConfig, read_draft_config, read_target
from onlinespec.draft.header import canonical_names, target_digest
from onlinespec.draft.place import check_device
from onlinespec.draft.start import is_fresh, read_start
from onlinespec.draft.trainable import check_trainable
from onlinespec.errors import StartError
from onlinespec.paths import RunPaths
from onlinespec.versions.journal import Journal, Published, RolledBack, TargetChanged
from onlinespec.versions.manifest import Provenance
from onlinespec.versions.state import state_of
from onlinespec.versions.store import Incumbent, VersionStore


@dataclass(frozen=True)
class Provision:
    """The draft a server loads: a directory of the version store."""

    path: Path
    version: int
    target_digest: str
    max_context_tokens: int
    notices: tuple[str, ...]


def resolve_model(model: str) -> Path:
    """Directory of the target: a path, or a Hugging Face id that is already downloaded or can be.

    Raises: StartError where there is neither.
    """
    path = Path(model)
    if path.is_dir():
        return path.absolute()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise StartError(
            f"model {model}: no such directory, and no such model on the hub ({type(error).__name__});"
            " give the path of a model directory"
        ) from error


def provision_draft(
    target: Path, draft: str, paths: RunPaths, context_tokens: int, trainer: TrainerConfig
) -> Provision:
    """Resume the incumbent, or make version 1 of a fresh or a given draft.

    draft: see `draft.start`.
    context_tokens: the server's --context-length; 0 means the target's own.
    Raises: CheckpointError where the draft does not fit; ConfigError where it cannot be trained as `trainer` says;
    VersionError where the store is another target's.
    """
    facts = read_target(target)
    digest = target_digest(target)
    context = context_tokens or facts.max_position_embeddings
    store = VersionStore(paths)
    journal = Journal(paths)
    incumbent = store.incumbent_for(digest)
    if incumbent is not None:
        version = incumbent.manifest.version
        _check_trainable(read_draft_config(paths.version(version)), trainer)
        _note_target(journal, digest)
        return Provision(paths.version(version), version, digest, context, _resumed(journal, incumbent, draft))
    notices: tuple[str, ...] = ()
    config, weights = read_start(draft, target, trainer.seed, context)
    if is_fresh(draft):
        notices = (
            "starting from an untrained draft: until it has learned, a verify step emits about one token and costs"
            " more than a plain decode step; expect lower speed at first",
        )
    _check_trainable(config, trainer)
    manifest = store.publish(
        lambda folder: write_draft(folder, config, weights),
        parent=None,
        target_digest=digest,
        provenance=Provenance(
            optimizer_steps=0, answer_tokens=0, seed=trainer.seed, tenants=(), is_fresh=is_fresh(draft)
        ),
        created_s=time.time(),
        may_reuse=True,  # a server that never became ready left its version behind
    )
    if manifest.version not in state_of(journal.read()).digests:
        journal.append(Published(time_s=time.time(), version=manifest.version, digest=manifest.digest))
    return Provision(paths.version(manifest.version), manifest.version, digest, context, notices)


def _resumed(journal: Journal, incumbent: Incumbent, draft: str) -> tuple[str, ...]:
    """Write down where the journal's version gave way to an ancestor, and tell what is resumed."""
    version, was = incumbent.manifest.version, incumbent.instead_of
    if was is None:
        return (f"resuming draft version {version}, the last one in service; --draft {draft} is not read",)
    event = RolledBack(
        time_s=time.time(),
        from_version=was,
        to_version=version,
        by="serve",
        barred_digest=None,
        reason=incumbent.reason,
    )
    journal.append(event)
    return (f"resuming draft version {version} instead of {was}, which cannot be served: {incumbent.reason}",)


def _note_target(journal: Journal, digest: str) -> None:
    """A target that changed while it was served, and is started from its first files again, changes back."""
    last = state_of(journal.read()).target_digest
    if last not in (None, digest):
        journal.append(TargetChanged(time_s=time.time(), from_digest=last, to_digest=digest))


def _check_trainable(config: DraftConfig, trainer: TrainerConfig) -> None:
    check_device(trainer.device)
    check_trainable(canonical_names(config), trainer.kv_mode, trainer.lora_rank, trainer.lora_targets)
