"""A recording as training sees it: one stream over all epochs, and the samples that only evaluate.

A sample's place in the stream is its request number: epoch times the recording's length plus its index. Its times
move on by the recording's length in seconds with every epoch, so that an hour to live is an hour of recorded traffic.
The side of a conversation is decided by a hash, all its turns and repeats together.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from onlinespec.draft.sample import Sample
from onlinespec.errors import TrainError
from onlinespec.gate.holdout import group_of, is_holdout
from onlinespec.record.reader import Recording

# Not secret: offline nobody can choose the side his traffic falls on after the fact.
_SIDE_KEY = b"onlinespec offline evaluation"
_CACHED_SHARDS = 8


def is_evaluated(sample: Sample, eval_frac: float) -> bool:
    """Whether a conversation is kept from training. Live recordings bring its group; else the prompt stands for it."""
    name = list(sample.group) or sample.tokens_T[: sample.num_prompt_tokens].tolist()
    return is_holdout(group_of(_SIDE_KEY, sample.tenant, name), eval_frac)


@dataclass(frozen=True)
class Survey:
    """What one pass over a recording found; the pass also holds every shard against its digest."""

    evaluation: tuple[Sample, ...]
    """never trained on, answers that training has left out, at most as many as were asked for"""
    num_training: int
    num_training_tokens: int
    """of their answers"""
    num_repeats: int
    """evaluation samples dropped because training has their answer"""
    num_incomplete: int
    """evaluation samples dropped for want of rows"""
    span_s: float
    """from the first to the last end of a request"""


def survey(recording: Recording, eval_frac: float, max_evaluated: int, max_missing_frac: float) -> Survey:
    """Read a recording once.

    Raises: TrainError where nothing is left to train on; RecordError where a shard is damaged.
    """
    answers: set[int] = set()
    candidates: list[Sample] = []
    ended_s: list[float] = []
    num_training = num_tokens = num_incomplete = num_repeats = 0
    for sample in recording:
        ended_s.append(sample.ended_s)
        if not is_evaluated(sample, eval_frac):
            num_training += 1
            num_tokens += sample.num_answer_tokens
            answers.add(hash(sample.answer_key))
        elif sample.missing_prompt_frac > max_missing_frac:
            num_incomplete += 1
        elif len(candidates) < 2 * max_evaluated:  # spares for those whose answers training turns out to have
            candidates.append(sample)
    if not num_training:
        raise TrainError(
            f"{recording.directory}: none of its {len(recording)} samples is left to train on; "
            f"record more, or lower --eval-frac"
        )
    unseen = [sample for sample in candidates if hash(sample.answer_key) not in answers]
    num_repeats = len(candidates) - len(unseen)
    return Survey(
        evaluation=tuple(unseen[:max_evaluated]),
        num_training=num_training,
        num_training_tokens=num_tokens,
        num_repeats=num_repeats,
        num_incomplete=num_incomplete,
        span_s=max(ended_s) - min(ended_s),
    )


class Stream(Mapping[int, Sample]):
    """All training samples of all epochs, by place; in order, or one by one as a resumed buffer asks for them."""

    def __init__(self, recording: Recording, eval_frac: float, epochs: int, span_s: float):
        self._recording = recording
        self._eval_frac = eval_frac
        self._epochs = epochs
        self._span_s = span_s
        self._shards: OrderedDict[int, list[Sample]] = OrderedDict()

    def __len__(self) -> int:
        """Places; those of evaluation samples are passed over."""
        return self._epochs * len(self._recording)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def since(self, place: int) -> Iterator[Sample]:
        """Training samples in order, from a place on."""
        length = len(self._recording)
        for epoch in range(place // length, self._epochs):
            first = max(0, place - epoch * length)
            for index, sample in enumerate(self._recording.since(first), first):
                if not is_evaluated(sample, self._eval_frac):
                    yield self._placed(sample, epoch, index)

    def __getitem__(self, place: int) -> Sample:
        epoch, index = divmod(place, len(self._recording))
        shard, offset = self._recording.locate(index)
        if shard not in self._shards:
            self._shards[shard] = self._recording.read_shard(shard)
            if len(self._shards) > _CACHED_SHARDS:
                self._shards.popitem(last=False)
        return self._placed(self._shards[shard][offset], epoch, index)

    def _placed(self, sample: Sample, epoch: int, index: int) -> Sample:
        later_s = epoch * self._span_s
        return replace(
            sample,
            request=epoch * len(self._recording) + index,
            started_s=sample.started_s + later_s,
            ended_s=sample.ended_s + later_s,
        )
