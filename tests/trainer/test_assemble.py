"""Requests put together again, held against a loop over single rows."""

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from onlinespec.errors import WireError
from onlinespec.trainer.assemble import Assembler
from onlinespec.trainer.prefix import PrefixRows
from onlinespec.wire.frames import FrameHeader, header_of
from onlinespec.wire.messages import RequestEnded, RequestStarted, Rows, Segment, decode_sample, encode

AUX, TOP_K = 6, 2
PROMPT, ANSWER = [11, 12, 13, 14, 15], [21, 22, 23, 24, 25, 26, 27]


def aux_row(tokens: list[int], position: int, salt: float = 0.0) -> list[float]:
    """A hidden state: it depends on the tokens up to its position and on nothing else."""
    return [float(sum(tokens[: position + 1]) + channel) + salt for channel in range(AUX)]


@dataclass
class Server:
    """What the tap would send for one request, segment by segment. salt marks rows of a second delivery."""

    tokens: list[int] = field(default_factory=lambda: PROMPT + ANSWER)
    num_prompt: int = len(PROMPT)
    request: int = 1

    def started(self, cached: int = 0, time_s: float = 5.0) -> RequestStarted:
        prompt = self.tokens[: self.num_prompt]
        return RequestStarted(self.request, "acme", prompt, cached, 0.5, 20, 0.9, time_s)

    def ended(self, num_output: int | None = None) -> RequestEnded:
        count = len(self.tokens) - self.num_prompt if num_output is None else num_output
        return RequestEnded(self.request, "stop", 2, 3, count, 9.0)

    def prefill(self, start: int, end: int, salt: float = 0.0) -> tuple[Segment, float]:
        """Rows [start, end); the token after them is committed where the prompt is done."""
        is_done = end >= self.num_prompt
        tokens = [self.tokens[end]] if is_done else []
        segment = Segment(self.request, False, start, end - start, tokens, end * is_done, len(tokens), 0, 0, 0, False)
        return segment, salt

    def verify(self, start: int, count: int, version: int = 3, salt: float = 0.0) -> tuple[Segment, float]:
        """Rows [start, start + count) commit the tokens one further on."""
        tokens = self.tokens[start + 1 : start + 1 + count]
        segment = Segment(
            self.request, True, start, count, tokens, start + 1, count, 3, count - 1, version, is_mixed=version > 3
        )
        return segment, salt

    def whole(self) -> list[tuple[Segment, float]]:
        """A prompt of 5 in two chunks, then an answer of 7 in steps of 1, 2 and 3 tokens."""
        return [self.prefill(0, 3), self.prefill(3, 5), self.verify(5, 1), self.verify(6, 2, 4), self.verify(8, 3, 4)]

    def frames(self, segments: list[tuple[Segment, float]]) -> list[np.ndarray]:
        aux, teacher = [], []
        for segment, salt in segments:
            positions = range(segment.position, segment.position + segment.num_rows)
            aux += [aux_row(self.tokens, p, salt) for p in positions]
            teacher += [p + salt for p in positions[len(positions) - segment.num_teacher_rows :]]
        lse_M = np.array(teacher, np.float32)
        logits_Mk = np.stack([lse_M - 1, lse_M - 2], axis=1)
        ids_Mk = np.stack([lse_M, lse_M + 1], axis=1).astype(np.int32)
        return [np.array(aux, np.float32).reshape(-1, AUX), ids_Mk, logits_Mk, lse_M]

    def message(self, segments: list[tuple[Segment, float]]) -> tuple[Rows, list[memoryview]]:
        arrays = self.frames(segments)
        message = Rows([segment for segment, _ in segments], [header_of(array) for array in arrays])
        decoded = decode_sample(encode(message))
        assert isinstance(decoded, Rows)
        return decoded, [memoryview(array.tobytes()) for array in arrays]


def build_assembler(prefix_bytes: int = 0, ttl_s: float = 60.0, max_open_bytes: int = 2**20) -> Assembler:
    return Assembler(PrefixRows(prefix_bytes), ttl_s, max_open_bytes)


def deliver(assembler: Assembler, server: Server, segments: list[tuple[Segment, float]], cached: int = 0):
    """The whole life of a request, each segment in a message of its own; its sample or None."""
    assembler.start(server.started(cached))
    for segment in segments:
        assembler.rows(*server.message([segment]))
    return assembler.end(server.ended())


def test_a_request_that_arrived_whole_is_complete_and_its_own():
    server = Server()

    sample = deliver(build_assembler(), server, server.whole())

    assert sample.tokens_T.tolist() == PROMPT + ANSWER
    assert sample.is_complete
    assert sample.num_completed_rows == 0
    assert not bool(sample.has_aux_T[-1])
    assert (sample.request, sample.tenant, sample.num_prompt_tokens, sample.temperature) == (1, "acme", 5, 0.5)
    assert (sample.finish_reason, sample.started_s, sample.ended_s) == ("stop", 5.0, 9.0)
    assert sample.aux_TA[7].tolist() == aux_row(server.tokens, 7)
    assert sample.has_teacher_T.tolist() == [False] * 4 + [True] * 7 + [False]
    assert sample.teacher_lse_T[4:11].tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert sample.teacher_ids_Tk[6].tolist() == [6, 7]
    assert sample.teacher_logits_Tk[6].tolist() == [5, 4]


def test_verify_steps_are_told_as_the_server_counted_them():
    server = Server()

    verify = deliver(build_assembler(), server, server.whole()).verify

    assert (verify.start, verify.num_committed) == ([5, 6, 8], [1, 2, 3])
    assert (verify.num_drafted, verify.num_correct) == ([3, 3, 3], [0, 1, 2])
    assert (verify.version, verify.is_mixed) == ([3, 4, 4], [False, True, True])


def reference(server: Server, segments: list[tuple[Segment, float]]):
    """Row by row: position -> salt of its last delivery; tokens that are known; steps in order."""
    aux: dict[int, float] = {}
    teacher: dict[int, float] = {}
    tokens = set(range(server.num_prompt))
    starts = []
    for segment, salt in segments:
        for j in range(segment.num_rows):
            aux[segment.position + j] = salt
            if j >= segment.num_rows - segment.num_teacher_rows:
                teacher[segment.position + j] = salt
        for j in range(len(segment.tokens)):
            tokens.add(segment.token_position + j)
        if segment.is_verify:
            starts.append(segment.position)
    return aux, teacher, tokens, starts


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_lost_doubled_or_late_the_sample_is_that_of_a_loop_over_rows(seed: int):
    rng, server, assembler = random.Random(seed), Server(), build_assembler()
    again = [(segment, 1000.0) for segment, _ in server.whole()]
    segments = [part for part in server.whole() if rng.random() < 0.85] + rng.sample(again, rng.randrange(5))
    if rng.random() < 0.3:
        rng.shuffle(segments)
    aux, teacher, tokens, starts = reference(server, segments)

    sample = deliver(assembler, server, segments)

    if tokens != set(range(len(server.tokens))):
        assert sample is None
        assert assembler.counters == {"samples_with_lost_tokens": 1}
        return
    assert sample.tokens_T.tolist() == server.tokens
    assert sample.verify.start == starts
    for p in range(len(server.tokens)):
        assert bool(sample.has_aux_T[p]) == (p in aux)
        assert sample.aux_TA[p].tolist() == (aux_row(server.tokens, p, aux[p]) if p in aux else [0.0] * AUX)
        assert bool(sample.has_teacher_T[p]) == (p in teacher)
        assert sample.teacher_lse_T[p].item() == (p + teacher[p] if p in teacher else 0.0)
    assert assembler.counters["rows_missing"] == sum(p not in aux for p in range(len(server.tokens) - 1))


def test_one_message_may_carry_segments_of_several_requests():
    assembler, first, second = build_assembler(), Server(), Server([31, 32, 33, 41, 42], 3, request=2)
    for server in (first, second):
        assembler.start(server.started())
    parts = [[part] for part in first.whole()]
    parts[1] += [second.prefill(0, 3)]
    parts[2] += [second.verify(3, 1)]
    for part in parts:
        messages = [(first if s.request == 1 else second).frames([(s, salt)]) for s, salt in part]
        arrays = [np.concatenate(group) for group in zip(*messages, strict=True)]
        message = Rows([segment for segment, _ in part], [header_of(array) for array in arrays])
        assembler.rows(message, [memoryview(array.tobytes()) for array in arrays])

    samples = [assembler.end(server.ended()) for server in (first, second)]

    for server, sample in zip((first, second), samples, strict=True):
        last = len(server.tokens) - 1
        assert sample.is_complete
        assert sample.aux_TA[:last].tolist() == [aux_row(server.tokens, p) for p in range(last)]
    assert samples[1].has_teacher_T.tolist() == [False, False, True, True, False]


def test_rows_of_a_cached_prefix_are_completed_from_a_request_that_is_still_running():
    assembler = build_assembler(prefix_bytes=2**20)
    first = Server()
    assembler.start(first.started())
    assembler.rows(*first.message([first.prefill(0, 5)]))
    second = Server([*PROMPT[:4], 99, 51, 52], 5, request=2)

    sample = deliver(assembler, second, [second.prefill(4, 5), second.verify(5, 1)], cached=4)

    assert sample.is_complete
    assert sample.aux_TA[:6].tolist() == [aux_row(second.tokens, p) for p in range(6)]
    assert (assembler.counters["rows_missing"], assembler.counters["rows_completed"]) == (0, 4)
    assert sample.num_completed_rows == 4


def test_without_known_rows_a_cached_prefix_stays_a_hole():
    assembler, server = build_assembler(prefix_bytes=2**20), Server()

    sample = deliver(assembler, server, [server.prefill(4, 5), *server.whole()[2:]], cached=4)

    assert sample.has_aux_T.tolist() == [False] * 4 + [True] * 7 + [False]
    assert not sample.is_complete
    assert (assembler.counters["rows_missing"], assembler.counters["rows_completed"]) == (4, 0)


def test_answer_rows_of_a_finished_request_complete_the_next_turn_of_its_conversation():
    assembler, first = build_assembler(prefix_bytes=2**20), Server()
    deliver(assembler, first, first.whole())
    turn = Server([*PROMPT, *ANSWER, 61, 71, 72], len(PROMPT + ANSWER) + 1, request=2)

    sample = deliver(assembler, turn, [turn.prefill(11, 13), turn.verify(13, 1)], cached=11)

    assert sample.is_complete
    assert sample.aux_TA[10].tolist() == aux_row(turn.tokens, 10)


def test_a_stop_inside_an_accepted_run_cuts_rows_and_teachers_at_the_last_token():
    assembler, server = build_assembler(), Server()
    assembler.start(server.started())
    for part in [server.prefill(0, 5), server.verify(5, 3)]:
        assembler.rows(*server.message([part]))

    sample = assembler.end(server.ended(num_output=2))

    assert sample.tokens_T.tolist() == PROMPT + ANSWER[:2]
    assert sample.aux_TA.tolist() == [aux_row(server.tokens, p) for p in range(7)]
    assert sample.has_teacher_T.tolist() == [False] * 4 + [True] * 3


def test_bfloat16_rows_stay_such_and_keep_their_values():
    assembler, server = build_assembler(), Server()
    assembler.start(server.started())
    for part in server.whole():
        message, frames = server.message([part])
        values = torch.frombuffer(bytearray(frames[0]), dtype=torch.float32).bfloat16()
        frames[0] = memoryview(values.view(torch.uint16).numpy().tobytes())
        headers = [FrameHeader("bfloat16", message.frames[0].shape), *message.frames[1:]]
        assembler.rows(Rows(message.segments, headers), frames)

    sample = assembler.end(server.ended())

    assert sample.aux_TA.dtype == torch.bfloat16
    wanted = torch.tensor([aux_row(server.tokens, p) for p in range(11)]).bfloat16()
    assert torch.equal(sample.aux_TA[:11], wanted)


def test_float8_rows_are_decoded_with_their_scales_as_they_come():
    assembler, server = build_assembler(), Server()
    assembler.start(server.started())
    for part in server.whole():
        message, frames = server.message([part])
        rows = torch.frombuffer(bytearray(frames[0]), dtype=torch.float32).view(message.frames[0].shape)
        scale_N = 2.0 ** torch.arange(len(rows))
        packed = (rows / scale_N[:, None]).to(torch.float8_e4m3fn)
        frames = [memoryview(packed.view(torch.uint8).numpy().tobytes()), *frames[1:], memoryview(scale_N.numpy())]
        headers = [FrameHeader("float8_e4m3fn", message.frames[0].shape), *message.frames[1:]]
        assembler.rows(Rows(message.segments, [*headers, FrameHeader("float32", [len(rows)])]), frames)

    sample = assembler.end(server.ended())

    assert sample.aux_TA.dtype == torch.bfloat16
    wanted = torch.tensor([aux_row(server.tokens, p) for p in range(11)])
    assert torch.allclose(sample.aux_TA[:11].float(), wanted, rtol=1 / 16)
    assert sample.teacher_lse_T[4:11].tolist() == [4, 5, 6, 7, 8, 9, 10]


def test_float8_rows_without_their_scales_are_no_rows():
    assembler, server = build_assembler(), Server()
    assembler.start(server.started())
    message, frames = server.message([server.prefill(0, 5)])
    headers = [FrameHeader("float8_e4m3fn", message.frames[0].shape), *message.frames[1:]]

    with pytest.raises(WireError, match="came with 5 rows"):
        assembler.rows(Rows(message.segments, headers), [memoryview(bytes(5 * AUX)), *frames[1:]])


def test_what_is_kept_does_not_alias_the_buffers_of_the_wire():
    assembler, server = build_assembler(), Server()
    assembler.start(server.started())
    for part in server.whole():
        message, frames = server.message([part])
        buffers = [bytearray(frame) for frame in frames]
        assembler.rows(message, [memoryview(buffer) for buffer in buffers])
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    assert assembler.end(server.ended()).aux_TA[3].tolist() == aux_row(server.tokens, 3)


def test_segments_and_ends_of_a_request_whose_start_was_lost_are_counted_and_dropped():
    assembler, server = build_assembler(), Server()

    assembler.rows(*server.message(server.whole()))
    sample = assembler.end(server.ended())

    assert sample is None
    assert assembler.counters == {"segments_without_start": 5, "ends_without_start": 1}


SHORT = {
    "one token": ([Server().prefill(0, 5)], 1),
    "no token": ([], 0),
}


@pytest.mark.parametrize(("segments", "num_output"), SHORT.values(), ids=SHORT.keys())
def test_an_answer_too_short_to_learn_from_is_counted_and_dropped(segments: list, num_output: int):
    assembler, server = build_assembler(), Server()
    assembler.start(server.started())
    for segment in segments:
        assembler.rows(*server.message([segment]))

    sample = assembler.end(server.ended(num_output))

    assert sample is None
    assert assembler.counters == {"samples_too_short": 1}


def test_a_request_is_ended_once():
    assembler, server = build_assembler(), Server()
    first = deliver(assembler, server, server.whole())

    second = assembler.end(server.ended())

    assert first is not None
    assert second is None
    assert assembler.counters["ends_without_start"] == 1


def test_a_request_whose_end_never_comes_is_forgotten_after_its_time():
    assembler, old, young = build_assembler(ttl_s=60.0), Server(request=1), Server(request=2)
    assembler.start(old.started(time_s=100.0))
    assembler.start(young.started(time_s=101.0))

    assembler.expire(160.0)
    kept = dict(assembler.counters)
    assembler.expire(160.5)

    assert kept == {}
    assert assembler.counters == {"samples_expired": 1}
    assert assembler.end(old.ended()) is None
    assembler.rows(*young.message(young.whole()))
    assert assembler.end(young.ended()) is not None


def wrong_frames(change: str) -> tuple[Rows, list[memoryview]]:
    """A message of 5 rows, 1 with a teacher, whose frames are wrong in one way."""
    server = Server()
    arrays = server.frames([server.prefill(0, 5)])
    if change == "a row too few":
        arrays[0] = arrays[0][:4]
    elif change == "a teacher too many":
        arrays[3] = np.zeros(2, np.float32)
    elif change == "a frame too few":
        arrays.pop()
    elif change == "flat rows":
        arrays[0] = arrays[0].reshape(-1)[:5]
    elif change == "a scalar":
        arrays[3] = np.float32(1.0).reshape(())
    message = Rows([server.prefill(0, 5)[0]], [header_of(array) for array in arrays])
    frames = [memoryview(array.tobytes()) for array in arrays]
    if change == "bytes missing":
        frames[0] = frames[0][:-4]
    return message, frames


@pytest.mark.parametrize(
    "change",
    ["a row too few", "a teacher too many", "a frame too few", "flat rows", "a scalar", "bytes missing"],
)
def test_frames_that_do_not_fit_their_segments_are_refused_and_nothing_is_kept(change: str):
    assembler, server = build_assembler(), Server()
    assembler.start(server.started())

    with pytest.raises(WireError):
        assembler.rows(*wrong_frames(change))

    assert assembler.end(server.ended()) is None
    assert assembler.counters == {"samples_with_lost_tokens": 1}


def test_rows_and_requests_are_counted_under_where_they_came_from():
    assembler = build_assembler(prefix_bytes=2**20)
    first, second = Server(), Server([*PROMPT[:4], 99, 51, 52], 5, request=2)
    other = Server([91, 92, 93, 94, 95, 96], 4, request=3)

    before = assembler.row_shares()
    deliver(assembler, first, first.whole())
    deliver(assembler, second, [second.prefill(4, 5), second.verify(5, 1)], cached=4)
    deliver(assembler, other, [other.prefill(3, 4), other.verify(4, 1)], cached=3)

    kinds = {kind: assembler.counters[f"samples_{kind}"] for kind in ("complete", "completed", "missing_context")}
    assert before == {}
    assert kinds == {"complete": 1, "completed": 1, "missing_context": 1}
    assert assembler.row_shares() == {"captured": 15 / 22, "completed": 4 / 22, "missing": 3 / 22}


def test_rows_in_flight_are_bounded_and_the_request_that_holds_most_is_given_up():
    row_bytes, teacher_bytes = AUX * 4, 2 * 4 + 2 * 4 + 4
    assembler = build_assembler(max_open_bytes=12 * row_bytes + 6 * teacher_bytes)
    long, short = Server(request=1), Server([31, 32, 33, 41, 42], 3, request=2)
    assembler.start(long.started())
    assembler.start(short.started())

    assembler.rows(*short.message([short.prefill(0, 3)]))
    sizes = []
    for part in long.whole():
        assembler.rows(*long.message([part]))
        sizes.append(assembler.open_bytes)
    assembler.rows(*short.message([short.verify(3, 1)]))

    assert max(sizes) <= 12 * row_bytes + 6 * teacher_bytes
    assert assembler.end(long.ended()) is None
    assert assembler.end(short.ended()).is_complete
    assert assembler.counters["samples_over_memory"] == 1
    assert not {"segments_without_start", "ends_without_start", "samples_with_lost_tokens"} & set(assembler.counters)
    assert assembler.open_bytes == 0


def test_a_request_that_was_given_up_and_never_ends_is_counted_once():
    assembler, server = build_assembler(max_open_bytes=1), Server()
    assembler.start(server.started(time_s=0.0))
    assembler.rows(*server.message(server.whole()))

    assembler.expire(1000.0)

    assert assembler.counters == {"samples_over_memory": 1}


def test_what_ends_or_expires_gives_its_bytes_back():
    assembler, server = build_assembler(ttl_s=60.0), Server()
    assembler.start(server.started(time_s=0.0))
    assembler.rows(*server.message(server.whole()))
    held = assembler.open_bytes
    assembler.start(server.started(time_s=0.0))
    again = assembler.open_bytes
    assembler.rows(*server.message(server.whole()))

    assembler.expire(100.0)

    assert (held > 0, again, assembler.open_bytes) == (True, 0, 0)
