"""Which requests judge candidates, and which train.

A request judges only where nothing has trained on its conversation. A keyed share of conversations never trains: their
repeats and later turns go on judging. Every other conversation judges at its first turn and trains from then on (test,
then train). That is as sound: a candidate's weights were frozen before the request, and the draft in service and its
parent before that, so what is trained on it later shapes none of them. A later turn that came without its first, or
whose template is not known, may hold text that has trained in another conversation's name; it only trains.

So new conversations weigh more in a verdict than repeats and later turns, which `holdout_frac` alone brings in.

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
    """What a request is for: to judge with, to train on after that, both or neither."""

    is_judge: bool
    trains: bool


class Sides:
    """Memory: two integers a trained request, the newest `MAX_SEEN` of each; hashes of integers alone, so that a
    restart finds the same ones. key: see `group_of`."""

    def __init__(self, key: bytes, config: GateConfig):
        self._key = key
        self._config = config
        self._groups: OrderedDict[int, None] = OrderedDict()
        self._answers: OrderedDict[int, None] = OrderedDict()

    def side(self, sample: Sample, opening: Sequence[int], is_first_turn: bool) -> tuple[Sample, Side]:
        """The sample with its group, and its side. opening: tokens that a conversation's requests all begin with."""
        sample = replace(sample, group=group_of(self._key, sample.tenant, opening))
        is_held_out = is_holdout(sample.group, self._config.holdout_frac)
        may_judge = is_held_out or (self._config.judge_new and is_first_turn)
        is_untrained = _number(sample.group) not in self._groups  # held out ones too: the share may have been raised
        return sample, Side(may_judge and is_untrained, not is_held_out)

    def train(self, sample: Sample) -> None:
        """It shapes what is frozen from now on. sample: with its group."""
        _put(self._groups, [_number(sample.group)])
        _put(self._answers, [hash(sample.answer_key)])

    def was_trained_on(self, answer_key: tuple[int, ...]) -> bool:
        """An answer of the very same tokens has trained, whatever its conversation."""
        return hash(answer_key) in self._answers

    def state(self) -> dict[str, list[int]]:
        """A copy, in plain types."""
        return {"groups": list(self._groups), "answers": list(self._answers)}

    def load_state(self, state: dict[str, list[int]]) -> None:
        """Go on where the one that gave this state stood."""
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
