"""What the buffer remembers, forgets and draws."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from onlinespec.config import BufferConfig
from onlinespec.draft.rows import build_rows
from onlinespec.draft.sample import VerifySteps
from onlinespec.trainer.buffer import Buffer, crop, live_accept_length
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


def test_rows_beyond_the_byte_bound_leave_the_reservoir_and_then_the_window_and_it_grows_again():
    config = BufferConfig(recent_samples=2, reservoir_samples=16, max_bytes=10 * SAMPLE.num_bytes)
    long = build_sample(0, 3, 30)
    buffer = Buffer(config, torch.Generator().manual_seed(0))
    counts = []

    for number in range(60):
        sample = long if 20 <= number < 40 else SAMPLE
        buffer.add(replace(sample, request=number, ended_s=float(number)), now_s=0.0)
        kept = {sample.request: sample for sample in (*buffer.draw(2, 0.0), *buffer._reservoir.samples)}
        assert sum(sample.num_bytes for sample in kept.values()) <= config.max_bytes
        counts.append(len(buffer))

    assert counts[19] >= 9
    assert counts[39] < 5
    assert counts[59] > counts[39]


def test_one_sample_is_kept_whatever_its_size():
    buffer = Buffer(BufferConfig(max_bytes=1), torch.Generator().manual_seed(0))

    for number in range(3):
        buffer.add(numbered(number), 0.0)

    assert requests(buffer.draw(4, 0.0)) == [2]


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


TASKS = [torch.randn(SAMPLE.aux_TA.shape[1], generator=torch.Generator().manual_seed(task)) for task in range(3)]


def of_task(number: int, task: int, ended_s: float = 0.0, committed: list[int] | None = None, num_answer: int = 3):
    """A request whose hidden states tell its task. committed: tokens of each verify step."""
    sample = build_sample(number, 3, num_answer, ended_s=ended_s)
    steps = committed or []
    verify = VerifySteps([0] * len(steps), [3] * len(steps), [n - 1 for n in steps], steps, [1] * len(steps))
    return replace(sample, aux_TA=(0.3 * sample.aux_TA + TASKS[task]) * sample.has_aux_T[:, None], verify=verify)


def test_the_replay_of_a_task_that_stopped_is_not_washed_out_by_one_that_goes_on():
    config = BufferConfig(recent_samples=4, reservoir_samples=20, replay_frac=0.5)
    buffer = Buffer(config, torch.Generator().manual_seed(0))
    clusters = [buffer.add(of_task(number, task=0), 0.0) for number in range(40)]
    clusters += [buffer.add(of_task(number, task=1), 0.0) for number in range(40, 400)]

    replayed = Counter(request < 40 for _ in range(50) for request in requests(buffer.draw(4, 0.0))[4:])

    assert len(set(clusters[-300:])) == 1
    assert len(buffer.clusters) == 2
    assert sorted(buffer.cluster_sizes().values()) == [10, 14]
    assert 0.4 < replayed[True] / replayed.total() < 0.6


def tokens_drawn_per_token(is_burst: bool) -> dict[str, float]:
    """Short and long requests, at more than is drawn; in a burst 12 short ones end after each long one."""
    buffer = Buffer(BufferConfig(recent_samples=8, replay_frac=0.0), torch.Generator().manual_seed(0))
    came: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    kinds: dict[int, str] = {}
    number = 0
    for _ in range(40):
        order = ["long", *["short"] * 12] if is_burst else [*["short"] * 6, "long", *["short"] * 6]
        for kind in order:
            number += 1
            sample = build_sample(number, 3, {"short": 2, "long": 20}[kind])
            kinds[number] = kind
            came[kind] += sample.num_answer_tokens
            buffer.add(sample, 0.0)
        for _ in range(5):
            for sample in buffer.draw(2, 0.0):
                drawn[kinds[sample.request]] += sample.num_answer_tokens
    return {kind: drawn[kind] / came[kind] for kind in came}


@pytest.mark.parametrize("is_burst", [False, True])
def test_every_long_request_is_drawn_as_often_per_token_as_the_short_ones_that_ended_before_it(is_burst: bool):
    per_token = tokens_drawn_per_token(is_burst)

    assert per_token["long"] >= per_token["short"]
    assert per_token["long"] >= 1.0


def test_a_request_that_was_not_drawn_outlives_those_that_were():
    buffer = Buffer(BufferConfig(recent_samples=3, replay_frac=0.0), torch.Generator().manual_seed(0))
    for number in range(3):
        buffer.add(numbered(number), 0.0)
    drawn = requests(buffer.draw(2, 0.0))

    buffer.add(numbered(3), 0.0)
    buffer.add(numbered(4), 0.0)

    assert drawn == [2, 1]
    assert sorted(requests(buffer.draw(3, 0.0))) == [0, 3, 4]


def test_a_request_that_the_draft_served_badly_is_a_failure_case_by_its_live_accept_length():
    config = BufferConfig(accept_threshold=2.0)
    buffer = Buffer(config, torch.Generator().manual_seed(0))

    for number, committed in enumerate([[1, 2], [2, 2], [3, 1, 1], [4]]):
        buffer.add(of_task(number, 0, committed=committed), 0.0)
    buffer.add(of_task(9, 0), 0.0)

    assert buffer.num_failures == 2
    assert live_accept_length(of_task(0, 0, committed=[1, 2]).verify) == 1.5
    assert live_accept_length(VerifySteps()) is None


def test_steps_at_depth_zero_say_nothing_of_the_draft():
    verify = VerifySteps([3, 4, 7], [0, 3, 0], [0, 2, 0], [1, 3, 1], [1, 1, 1])

    assert live_accept_length(verify) == 3.0
    assert live_accept_length(VerifySteps([3], [0], [0], [1], [1])) is None


@pytest.mark.parametrize(("frac", "expected"), [(0.5, 0.5), (0.25, 0.25), (1.0, 1.0), (0.0, 0.0)])
def test_failure_cases_make_up_their_share_of_the_new_requests(frac: float, expected: float):
    config = BufferConfig(accept_threshold=2.0, failure_frac=frac, replay_frac=0.0)
    buffer = Buffer(config, torch.Generator().manual_seed(0))
    for number in range(20):
        buffer.add(of_task(number, 0, committed=[1] if number % 4 == 0 else [3]), 0.0)

    drawn = [request for _ in range(100) for request in requests(buffer.draw(2, 0.0))]

    share = sum(request % 4 == 0 for request in drawn) / len(drawn)
    assert share == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(("frac", "num_failures"), [(1.0, 1), (0.0, 3)])
def test_where_there_are_too_few_of_one_kind_the_other_fills_the_batch(frac: float, num_failures: int):
    config = BufferConfig(accept_threshold=2.0, failure_frac=frac, replay_frac=0.0)
    buffer = Buffer(config, torch.Generator().manual_seed(0))
    for number in range(3):
        buffer.add(of_task(number, 0, committed=[1] if number < num_failures else [3]), 0.0)

    assert sorted(requests(buffer.draw(3, 0.0))) == [0, 1, 2]


def stream(num: int):
    return [
        of_task(n, task=n // 7 % 3, ended_s=float(n), committed=[1 + n % 3] * 2, num_answer=2 + n % 5)
        for n in range(num)
    ]


def play(buffer: Buffer, samples) -> list[list[int]]:
    batches = []
    for sample in samples:
        buffer.add(sample, sample.ended_s)
        batches.append(requests(buffer.draw(2, sample.ended_s)))
    return batches


CONFIG = BufferConfig(
    recent_samples=6, reservoir_samples=12, num_clusters=4, ttl_s=50.0, accept_threshold=2.0, max_sequence_tokens=6
)


def test_a_resumed_buffer_draws_exactly_what_an_unbroken_one_does(tmp_path):
    samples, generator = stream(160), torch.Generator().manual_seed(5)
    unbroken = play(Buffer(CONFIG, torch.Generator().manual_seed(5)), samples)
    first = Buffer(CONFIG, generator)
    play(first, samples[:90])
    torch.save({"buffer": first.state(), "generator": generator.get_state()}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = torch.Generator()
    again.set_state(saved["generator"])
    second = Buffer(CONFIG, again)
    second.load_state(saved["buffer"], {sample.request: sample for sample in samples})

    assert play(second, samples[90:]) == unbroken[90:]
    assert second.num_failures == sum(n % 3 == 0 for n in range(160))


def test_without_rows_a_buffer_starts_empty_and_knows_its_clusters_and_counts():
    samples = stream(60)
    first, second = (Buffer(CONFIG, torch.Generator().manual_seed(5)) for _ in range(2))
    play(first, samples)

    second.load_state(first.state(), {})

    assert len(second) == 0
    assert second.draw(2, 60.0) == []
    assert (second.clusters.ids, second.num_failures) == (first.clusters.ids, first.num_failures)
    assert second.add(samples[0], 60.0) in first.clusters.ids


def test_a_state_that_names_a_request_that_is_gone_is_refused():
    samples = stream(20)
    first, second = (Buffer(CONFIG, torch.Generator().manual_seed(5)) for _ in range(2))
    play(first, samples)

    with pytest.raises(KeyError):
        second.load_state(first.state(), {0: samples[0]})
