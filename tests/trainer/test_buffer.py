"""What the buffer remembers, forgets and draws."""

import io
from collections import Counter
from dataclasses import replace

import pytest
import torch

from onlinespec.config import BufferConfig
from onlinespec.draft.rows import build_rows
from onlinespec.trainer.buffer import Buffer, Reservoir, crop
from tests.draft.tiny import build_draft, build_embedding, build_sample

SAMPLE = build_sample(0, 3, 3)


def numbered(number: int, ended_s: float = 0.0):
    return replace(SAMPLE, request=number, ended_s=ended_s)


def requests(samples) -> list[int]:
    return [sample.request for sample in samples]


def test_the_newest_requests_stay_and_the_oldest_move_to_the_reservoir():
    buffer = Buffer(BufferConfig(recent_samples=4, reservoir_samples=10), torch.Generator().manual_seed(0))

    for number in range(7):
        buffer.add(numbered(number), now_s=0.0)

    assert (buffer.num_recent, buffer.num_replay, len(buffer)) == (4, 3, 7)
    assert set(requests(buffer.draw(4, 0.0))[:4]) == {3, 4, 5, 6}


def test_a_batch_takes_the_least_drawn_and_then_the_newest():
    buffer = Buffer(BufferConfig(recent_samples=8), torch.Generator().manual_seed(0))
    for number in range(3):
        buffer.add(numbered(number), 0.0)

    first, second = requests(buffer.draw(2, 0.0)), requests(buffer.draw(2, 0.0))
    buffer.add(numbered(3), 0.0)
    third = requests(buffer.draw(2, 0.0))

    assert first == [2, 1]
    assert second == [0, 2]
    assert third == [3, 1]


@pytest.mark.parametrize(
    ("frac", "num_new", "expected"),
    [(0.5, 4, (4, 4)), (0.2, 4, (4, 1)), (0.75, 2, (2, 6)), (0.0, 4, (4, 0)), (1.0, 4, (0, 4))],
)
def test_replay_makes_up_its_share_of_the_batch(frac, num_new, expected):
    config = BufferConfig(recent_samples=8, reservoir_samples=16, replay_frac=frac)
    buffer = Buffer(config, torch.Generator().manual_seed(0))
    for number in range(30):
        buffer.add(numbered(number), 0.0)

    drawn = requests(buffer.draw(num_new, 0.0))

    assert (sum(n >= 22 for n in drawn), sum(n < 22 for n in drawn)) == expected
    assert len(set(drawn)) == len(drawn)


def test_there_is_no_replay_while_the_reservoir_is_empty():
    buffer = Buffer(BufferConfig(recent_samples=8, replay_frac=1.0), torch.Generator().manual_seed(0))
    buffer.add(numbered(0), 0.0)

    assert requests(buffer.draw(2, 0.0)) == [0]
    assert Buffer(BufferConfig(), torch.Generator()).draw(2, 0.0) == []


@pytest.mark.parametrize("has_expiry", [False, True])
def test_the_reservoir_is_a_uniform_sample_of_what_has_not_expired(has_expiry):
    counts: Counter[int] = Counter()
    generator = torch.Generator().manual_seed(0)
    num_runs, total = 1500, 0
    for _ in range(num_runs):
        reservoir = Reservoir(5, generator)
        for number in range(12):
            reservoir.offer(numbered(number, ended_s=number))
            if has_expiry:
                reservoir.expire(number - 7.0)
        counts.update(requests(reservoir.samples))
        total += len(reservoir.samples)

    alive = range(4, 12) if has_expiry else range(12)
    expected = total / len(alive)
    assert set(counts) == set(alive)
    assert all(abs(counts[number] - expected) < 5 * expected**0.5 for number in alive)
    assert total / num_runs > 3


def test_requests_are_forgotten_after_their_time_to_live():
    config = BufferConfig(recent_samples=2, reservoir_samples=8, ttl_s=10.0)
    buffer = Buffer(config, torch.Generator().manual_seed(0))
    for number in range(5):
        buffer.add(numbered(number, ended_s=number), now_s=number)

    buffer.expire(now_s=12.5)
    assert set(requests(buffer.draw(2, now_s=12.5))) == {3, 4}
    assert buffer.draw(2, now_s=13.5)
    assert len(buffer) == 1
    assert buffer.draw(2, now_s=15.0) == []
    assert len(buffer) == 0


def test_the_same_seed_gives_the_same_batches():
    def batches(seed):
        buffer = Buffer(BufferConfig(recent_samples=4, reservoir_samples=6), torch.Generator().manual_seed(seed))
        out = []
        for number in range(40):
            buffer.add(numbered(number), 0.0)
            out.append(requests(buffer.draw(2, 0.0)))
        return out

    assert batches(1) == batches(1)
    assert batches(1) != batches(2)


def test_clear_forgets_everything():
    buffer = Buffer(BufferConfig(recent_samples=2), torch.Generator().manual_seed(0))
    for number in range(5):
        buffer.add(numbered(number), 0.0)

    buffer.clear()

    assert len(buffer) == 0
    assert buffer.draw(2, 0.0) == []


@torch.no_grad()
def test_a_cropped_sample_gives_the_draft_the_logits_of_the_whole_without_the_cut_rows():
    sample, draft, embed = build_sample(1, 10, 8), build_draft(), build_embedding()
    has_aux_T = sample.has_aux_T & (torch.arange(18) >= 6)
    wanted = torch.arange(9, 17)

    cropped = crop(sample, 12)

    masked = draft.unroll(build_rows([replace(sample, has_aux_T=has_aux_T)], [wanted], embed, 3))
    found = draft.unroll(build_rows([cropped], [wanted - 6], embed, 3))
    torch.testing.assert_close(found, masked, atol=1e-5, rtol=1e-5)
    assert (cropped.num_tokens, cropped.num_prompt_tokens, cropped.num_answer_tokens) == (12, 4, 8)
    assert cropped.aux_TA.untyped_storage().nbytes() == cropped.aux_TA.nbytes
    assert crop(sample, 18) is sample
    assert crop(sample, 5).num_prompt_tokens == 0


def test_the_buffer_crops_what_it_keeps():
    buffer = Buffer(BufferConfig(max_sequence_tokens=4), torch.Generator().manual_seed(0))

    buffer.add(SAMPLE, 0.0)

    assert buffer.draw(1, 0.0)[0].num_tokens == 4


def test_a_buffer_that_takes_over_a_state_draws_what_the_first_would_have_drawn():
    config = BufferConfig(recent_samples=4, reservoir_samples=6, ttl_s=25.0, max_sequence_tokens=4)
    generator = torch.Generator().manual_seed(0)
    first = Buffer(config, generator)
    for number in range(40):
        first.add(numbered(number, ended_s=number), now_s=number)
        first.draw(2, now_s=number)
    other_generator = torch.Generator()
    other_generator.set_state(generator.get_state())
    second = Buffer(config, other_generator)

    second.load_state(first.state(), {number: numbered(number, ended_s=number) for number in range(40)})

    for number in range(40, 60):
        for buffer in (first, second):
            buffer.add(numbered(number, ended_s=number), now_s=number)
        drawn, again = (buffer.draw(2, now_s=number) for buffer in (first, second))
        assert requests(again) == requests(drawn)
        assert {sample.num_tokens for sample in again} == {4}


def test_a_state_holds_no_rows_and_is_read_back_without_pickle():
    buffer = Buffer(BufferConfig(recent_samples=2), torch.Generator().manual_seed(0))
    for number in range(5):
        buffer.add(numbered(number), 0.0)
    file = io.BytesIO()

    torch.save(buffer.state(), file)

    assert len(file.getvalue()) < 4000
    file.seek(0)
    assert torch.load(file, weights_only=True) == buffer.state()
