"""A draft that brings a tokenizer must bring the target's: its lm_head speaks ids, and ids mean nothing else. No torch.

Only the vocabulary is compared: merges, templates and normalisers never reach a draft.
"""

from pathlib import Path
from typing import Any

from onlinespec.draft.config import read_json
from onlinespec.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"


def check_tokenizer(draft: Path | str, target: Path | str) -> None:
    """Hold a draft's tokenizer.json against the target's; nothing to hold where either has none.

    Raises: CheckpointError naming both files and the first id that differs; or where a file is damaged.
    """
    ours, theirs = Path(draft) / TOKENIZER_FILE, Path(target) / TOKENIZER_FILE
    if not (ours.is_file() and theirs.is_file()):
        return
    found, wanted = _vocabulary(ours), _vocabulary(theirs)
    differing = sorted(number for number in found.keys() | wanted.keys() if found.get(number) != wanted.get(number))
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"{ours}: {len(differing)} of {len(found.keys() | wanted.keys())} tokens differ from the target's: id "
            f"{first} is {found.get(first)!r}, {theirs} says {wanted.get(first)!r}; give a draft made for this target, "
            f"or start one with --draft init"
        )


def _vocabulary(file: Path) -> dict[int, str]:
    """Id -> token of a tokenizer.json, added tokens included.

    Source: tokenizers 0.23, the vocab of BPE, WordPiece and WordLevel maps tokens to ids; that of Unigram lists
    (token, score) pairs in the order of ids.
    """
    raw = read_json(file)
    try:
        vocab: Any = raw["model"]["vocab"]
        if isinstance(vocab, dict):
            tokens = {int(number): str(token) for token, number in vocab.items()}
        else:
            tokens = {number: str(token) for number, (token, _score) in enumerate(vocab)}
        return tokens | {int(added["id"]): str(added["content"]) for added in raw.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: not a tokenizer ({error!r}); copy it again or remove it") from error
