"""Rows of prompts the server no longer computes: its prefix cache skips them, and so does the tap.

Hidden states at position p depend on tokens 0..p and nothing else, so rows seen once are exact for every
later request with the same prefix. Keys are a hash of that prefix. Least recently used rows go first, and
of one request the last positions before the first ones, so that what is left still completes a prefix.

T tokens of a request, A captured layers times D.
"""

import hashlib
from collections import OrderedDict

import torch

_OVERHEAD_BYTES = 256


class PrefixRows:
    """A cache of rows bounded in bytes; 0 keeps nothing. A row counts its data and 256 bytes of bookkeeping."""

    def __init__(self, max_bytes: int):
        self.num_hits = 0
        """missing rows that were filled"""
        self.num_misses = 0
        """missing rows that were not known"""
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def store(self, tokens_T: torch.Tensor, aux_TA: torch.Tensor, has_aux_T: torch.Tensor) -> None:
        """Remember the rows a request has. Shapes: int64 [T], [T, A], bool [T]."""
        if not self._max_bytes:
            return
        positions = has_aux_T.nonzero().squeeze(1).flip(0).tolist()
        keys = _keys(tokens_T, positions[0] + 1 if positions else 0)
        for position in positions:
            key = keys[position]
            if key in self._rows:
                self._rows.move_to_end(key)
                continue
            row = self._rows[key] = aux_TA[position].clone()
            self.num_bytes += row.nbytes + _OVERHEAD_BYTES
        while self.num_bytes > self._max_bytes:
            _, row = self._rows.popitem(last=False)
            self.num_bytes -= row.nbytes + _OVERHEAD_BYTES

    def complete(self, tokens_T: torch.Tensor, aux_TA: torch.Tensor, has_aux_T: torch.Tensor) -> int:
        """Fill the missing leading rows that are known, in place. Returns how many.

        Shapes: int64 [T], [T, A], bool [T].
        """
        present = has_aux_T.nonzero()
        num_missing = int(present[0]) if len(present) else len(has_aux_T)
        keys = _keys(tokens_T, num_missing)
        found = [position for position in reversed(range(num_missing)) if keys[position] in self._rows]
        for position in found:
            self._rows.move_to_end(keys[position])
        if found:
            aux_TA[found] = torch.stack([self._rows[keys[position]] for position in found]).to(aux_TA.dtype)
            has_aux_T[found] = True
        self.num_hits += len(found)
        self.num_misses += num_missing - len(found)
        return len(found)

    def clear(self) -> None:
        """Forget every row: the target's weights changed. Counts stay."""
        self._rows.clear()
        self.num_bytes = 0


def _keys(tokens_T: torch.Tensor, num_positions: int) -> list[bytes]:
    """For each position the hash of the tokens up to and with it."""
    data = tokens_T[:num_positions].to(torch.int64).numpy().tobytes()
    hasher = hashlib.blake2b(digest_size=16)
    keys = []
    for start in range(0, len(data), 8):
        hasher.update(data[start : start + 8])
        keys.append(hasher.digest())
    return keys
