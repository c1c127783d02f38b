"""What a conversation is, and which conversations never train.

A conversation is a keyed hash of the tenant and of the prompt up to the end of the first user turn. Later turns of a
conversation and verbatim repeats of it begin with the same tokens, hence are never parted, whatever their order, and a
restart with the same key decides the same way. The key keeps a client from choosing what is held out.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

GROUP_BYTES = 16
MIN_KEY_BYTES = 16


def group_of(key: bytes, tenant: str, first_user_message_tokens: Sequence[int]) -> bytes:
    """Hash a conversation into its group.

    Shapes: 16 bytes come back; `key` is 16 to 64 bytes and secret.
    """
    assert MIN_KEY_BYTES <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE, len(key)
    name = tenant.encode()
    digest = hashlib.blake2b(len(name).to_bytes(4, "little"), digest_size=GROUP_BYTES, key=key)
    digest.update(name)
    digest.update(np.asarray(first_user_message_tokens, dtype="<i8").tobytes())
    return digest.digest()


def is_holdout(group: bytes, holdout_frac: float) -> bool:
    """True for a share `holdout_frac` of groups; raising the share only adds groups."""
    return int.from_bytes(group[:8], "little") < holdout_frac * 2.0**64


def first_user_span(prompt_tokens: Sequence[int], generation_prompt_tokens: Sequence[int]) -> tuple[int, bool]:
    """Count the prompt tokens up to the end of the first user turn, and say whether no turn has followed it.

    The end is where the chat template first writes the assistant's header. An occurrence at position 0
    ends no turn and is passed over. The whole prompt counts where the header is not found: each turn of
    such a conversation is then a group of its own, and none is known to be its first.

    `generation_prompt_tokens` must be the header as it stands before an *earlier* answer. What a template
    appends only to the last turn (an empty think block) is to be cut off first, or the first turn and the
    later ones would find their ends in different places.

    Units: tokens, 1 to len(prompt_tokens); 0 only for an empty prompt.
    """
    header = list(generation_prompt_tokens)
    tokens = list(prompt_tokens)
    starts = [
        start
        for start in range(1, len(tokens) - len(header) + 1)
        if header and tokens[start] == header[0] and tokens[start : start + len(header)] == header
    ]
    return (starts[0], len(starts) == 1) if starts else (len(tokens), False)
