"""Which requests judge candidates, and which train.

A keyed share of conversations never trains: their repeats and later turns go on judging. Every other conversation
judges at its first request and trains from then on (test, then train). That is as sound: a candidate is judged only on
requests that started after its weights were frozen, and a conversation that nothing has trained on cannot have shaped
them. Once a conversation has trained, none of its requests judges again. So new conversations weigh more in a verdict
than repeats and later turns, which `holdout_frac` alone brings in.

Source of test-then-train: Dawid 1984, "Statistical Theory: The Prequential Approach".
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from onlinespec.config import GateConfig
from onlinespec.draft.sample import Sample
from onlinespec.gate.holdout import group_of, is_holdout

MAX_SEEN = 200_000


@dataclass(frozen=True)
class Side:
    """What a request is for."""

    is_judge: bool
    is_held_out: bool
    """it never trains"""


class Sides:
    """Memory: two integers a trained request, the newest `MAX_SEEN` of each; hashes of integers alone, so that a
    restart finds the same ones. key: see `group_of`."""

    def __init__(self, key: bytes, config: GateConfig):
        self._key = key
        self._config = config
        self._groups: OrderedDict[int, None] = OrderedDict()
        self._answers: OrderedDict[int, None] = OrderedDict()

    def side(self, sample: Sample, first_turn: Sequence[int]) -> tuple[Sample, Side]:
        """The sample with its group, and its side. first_turn: tokens that a conversation's requests all begin with."""
        sample = replace(sample, group=group_of(self._key, sample.tenant, first_turn))
        is_held_out = is_holdout(sample.group, self._config.holdout_frac)
        is_new = self._config.judge_new and _number(sample.group) not in self._groups
        return sample, Side(is_held_out or is_new, is_held_out)

    def train(self, sample: Sample) -> None:
        """It shapes what is frozen from now on. sample: with its group."""
        _put(self._groups, [_number(sample.group)])
        _put(self._answers, [hash(sample.answer_key)])

    def was_trained_on(self, answer_key: tuple[int, ...]) -> bool:
        """An answer of the very same tokens has trained, whatever its conversation."""
        return hash(answer_key) in self._answers

    def forget(self) -> None:
        """What was trained on says nothing of what comes: another target."""
        self._groups.clear()
        self._answers.clear()

    def state(self) -> dict[str, list[int]]:
        """A copy, in plain types."""
        return {"groups": list(self._groups), "answers": list(self._answers)}

    def load_state(self, state: dict[str, list[int]]) -> None:
        """Go on where the one that gave this state stood."""
        self.forget()
        _put(self._groups, state["groups"])
        _put(self._answers, state["answers"])


def _number(group: bytes) -> int:
    return int.from_bytes(group[:8], "little")


def _put(seen: OrderedDict[int, None], numbers: Iterable[int]) -> None:
    for number in numbers:
        seen[number] = None
        seen.move_to_end(number)
    while len(seen) > MAX_SEEN:
        seen.popitem(last=False)
