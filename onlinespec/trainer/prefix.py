"""Rows of prompts the server no longer computes: its prefix cache skips them, and so does the tap.

Hidden states at position p depend on tokens 0..p and nothing else, so rows seen once are exact for every
later request with the same prefix. Rows are kept in runs of up to 16 positions, one tensor each, and found one by
one: the key of a row is a hash of the tokens before its run's window and the tokens themselves from there on, so a
prefix that ends inside a window is completed to its last row. Least recently used runs go first, and of one
request the last positions before the first ones, so that what is left still completes a prefix.

T tokens of a request, A captured layers times D, N rows given.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch

_WINDOW = 16
_TOKEN_BYTES = 8
_OVERHEAD_BYTES = 384


@dataclass(frozen=True, eq=False)
class _Run:
    """Rows of consecutive positions of one window, and the key of each."""

    rows_nA: torch.Tensor
    keys: list[bytes]

    @property
    def num_bytes(self) -> int:
        return self.rows_nA.nbytes + _OVERHEAD_BYTES * len(self.keys)


class PrefixRows:
    """A cache of rows bounded in bytes; 0 keeps nothing. A row counts its data and 384 bytes of bookkeeping."""

    def __init__(self, max_bytes: int):
        self.num_hits = 0
        """missing rows that were filled"""
        self.num_misses = 0
        """missing rows that were not known"""
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._runs: OrderedDict[int, _Run] = OrderedDict()
        self._places: dict[bytes, tuple[int, int]] = {}
        """row's key -> number of its run, place in it"""
        self._num_runs = 0

    def __len__(self) -> int:
        return len(self._places)

    def store(self, tokens_T: torch.Tensor, aux_NA: torch.Tensor, has_aux_N: torch.Tensor, start: int = 0) -> None:
        """Remember rows of a request; row j stands at position start + j. Shapes: int64 [T], [N, A], bool [N]."""
        if not self._max_bytes:
            return
        positions = (has_aux_N.nonzero().squeeze(1) + start).tolist()
        keys = _keys(tokens_T, positions[-1] + 1 if positions else 0)
        for number, first, end in reversed(_spans([(p, self._number(keys[p])) for p in positions])):
            if number:
                self._runs.move_to_end(number)
            else:
                self._keep(aux_NA[first - start : end - start].clone(), keys[first:end])
        while self.num_bytes > self._max_bytes:
            _, run = self._runs.popitem(last=False)
            self.num_bytes -= run.num_bytes
            for key in run.keys:
                del self._places[key]

    def _keep(self, rows_nA: torch.Tensor, keys: list[bytes]) -> None:
        run = _Run(rows_nA, keys)
        self._num_runs += 1
        self._runs[self._num_runs] = run
        self._places.update((key, (self._num_runs, place)) for place, key in enumerate(keys))
        self.num_bytes += run.num_bytes

    def complete(self, tokens_T: torch.Tensor, aux_TA: torch.Tensor, has_aux_T: torch.Tensor) -> int:
        """Fill the missing leading rows that are known, in place. Returns how many.

        Shapes: int64 [T], [T, A], bool [T].
        """
        present = has_aux_T.nonzero()
        num_missing = int(present[0]) if len(present) else len(has_aux_T)
        keys = _keys(tokens_T, num_missing)
        num_found = 0
        for number, first, end in reversed(_spans([(p, self._number(keys[p])) for p in range(num_missing)])):
            if number:
                place = self._places[keys[first]][1]
                aux_TA[first:end] = self._runs[number].rows_nA[place : place + end - first]
                has_aux_T[first:end] = True
                num_found += end - first
                self._runs.move_to_end(number)
        self.num_hits += num_found
        self.num_misses += num_missing - num_found
        return num_found

    def _number(self, key: bytes) -> int:
        """Of the run that holds the row; 0 for none."""
        return self._places.get(key, (0, 0))[0]

    def clear(self) -> None:
        """Forget every row: the target's weights changed. Counts stay."""
        self._runs.clear()
        self._places.clear()
        self.num_bytes = 0


def _spans(numbered: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(position, number) to (number, first, end) of consecutive positions in one window with the same number."""
    spans: list[tuple[int, int, int]] = []
    for position, number in numbered:
        if spans and position % _WINDOW and spans[-1][0] == number and spans[-1][2] == position:
            spans[-1] = (number, spans[-1][1], position + 1)
        else:
            spans.append((number, position, position + 1))
    return spans


def _keys(tokens_T: torch.Tensor, num_positions: int) -> list[bytes]:
    """For each position, what stands for the tokens up to and with it: hashed up to its window, then as they are."""
    data = tokens_T[:num_positions].to(torch.int64).numpy().tobytes()
    hasher = hashlib.blake2b(digest_size=16)
    keys = []
    for window in range(0, len(data), _WINDOW * _TOKEN_BYTES):
        before = hasher.digest()
        tokens = data[window : window + _WINDOW * _TOKEN_BYTES]
        keys += [before + tokens[:end] for end in range(_TOKEN_BYTES, len(tokens) + 1, _TOKEN_BYTES)]
        hasher.update(tokens)
    return keys
