"""Rows of a pass reach the sender as they were made, however late the copy and however early the next replay."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from onlinespec.plugin import rows
from onlinespec.plugin.fuse import Fuse
from onlinespec.plugin.requests import RequestBook
from onlinespec.plugin.ring import Ring
from onlinespec.plugin.rows import RowCopier
from onlinespec.plugin.tap import Tap
from onlinespec.wire.messages import RequestEnded, RequestStarted, Rows
from tests.plugin.late import LateDevice, garble
from tests.plugin.test_requests import Commit, Params, Reason, Req

WIDTH, HIDDEN, VOCABULARY, TOP_K = 3, 6, 20, 4
ACCEPT_LENS = object()
"""of a verify step, where they are on the device: not for this thread to read"""


class Carrier:
    """Holds riders until the test commits."""

    hooks: dict = {}  # noqa: RUF012

    def __init__(self) -> None:
        self.riders: list = []

    def attach(self, _result, rider) -> None:
        self.riders.append(rider)


class Sender:
    """Queues like the real one; its thread is the test's call of `send`."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.offered: list = []

    def offer(self, message, frames=(), num_rows: int = 0) -> bool:
        self.offered.append((message, frames))
        return True

    def drop(self, num_rows: int, num_bytes: int) -> None:
        self.counters["dropped_rows"] += num_rows

    def send(self) -> list[tuple[Rows, list[np.ndarray]]]:
        sent = [(message, frames()) for message, frames in self.offered if isinstance(message, Rows)]
        self.offered = [(message, frames) for message, frames in self.offered if not isinstance(message, Rows)]
        return sent


class Server:
    """A scheduler whose graphs overwrite their buffers as soon as a pass is launched."""

    def __init__(self, ring_bytes: int = 2**16, is_float8: bool = False, dtype: torch.dtype = torch.float32):
        self.device, self.sender, self.carrier = LateDevice(), Sender(), Carrier()
        self.fuse = Fuse(max_faults=5, retry_s=60)
        self.book = RequestBook(is_greedy=True)
        self.ring = Ring(self.device.pinned((ring_bytes,), torch.uint8))
        copier = RowCopier(self.device, self.ring, TOP_K, is_float8)
        self.tap = Tap(self.sender, self.book, self.carrier, copier, lambda: 1, self.fuse.run)
        self._dtype = dtype
        self._made = torch.Generator().manual_seed(0)

    def _output(self, num_rows: int, num_logits: int) -> tuple[SimpleNamespace, torch.Tensor, torch.Tensor]:
        """Graph buffers, and what stood in them when the pass had run."""
        aux_NA = torch.randn(num_rows, HIDDEN, generator=self._made).to(self._dtype)
        logits_MV = torch.randn(num_logits, VOCABULARY, generator=self._made)
        output = SimpleNamespace(hidden_states=aux_NA.clone(), next_token_logits=logits_MV.clone())
        return output, aux_NA, logits_MV

    def launch(self, reqs: list[Req], is_prefill: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """One pass, as `Runtime` brackets it. Returns what its rows were."""
        mode = SimpleNamespace(is_idle=lambda: False, is_extend=lambda: is_prefill)
        lens = [len(req.origin_input_ids) for req in reqs]
        batch = SimpleNamespace(reqs=reqs, forward_mode=mode, prefix_lens=[0] * len(reqs), extend_lens=lens)
        layout = self.fuse.run(self.tap.before, batch)
        rows = (sum(lens), len(reqs)) if is_prefill else (WIDTH * len(reqs),) * 2
        output, aux_NA, logits_MV = self._output(*rows)
        result = SimpleNamespace(logits_output=output, speculative_num_draft_tokens=WIDTH, accept_lens=ACCEPT_LENS)
        self.tap.before_sampler(output)
        if not is_prefill:
            self.tap.after_verify(result)
        garble(output.hidden_states)
        garble(output.next_token_logits)
        draft = self._output(WIDTH, WIDTH)[0]
        self.tap.before_sampler(draft)
        if layout is not None:
            self.fuse.run(self.tap.after, result, layout)
        return aux_NA, logits_MV

    def commit(self, reqs: list[Req], tokens: list[list[int]], accept_lens: list[int] | None = None) -> None:
        """Of the oldest pass that has not been."""
        commits = []
        for req, new in zip(reqs, tokens, strict=True):
            commits.append(Commit(len(req.output_ids), tuple(new)) if new else None)
            req.output_ids += new
        lens = torch.tensor(accept_lens) if accept_lens is not None else None
        self.carrier.riders.pop(0).committed(reqs, commits, lens)


def expect_teacher(frames: list[np.ndarray], logits_MV: torch.Tensor) -> None:
    values_Mk, ids_Mk = logits_MV.topk(TOP_K, dim=1)
    assert np.array_equal(frames[1], ids_Mk.int().numpy())
    assert np.array_equal(frames[2], values_Mk.numpy())
    assert np.allclose(frames[3], logits_MV.logsumexp(1).numpy())


def test_rows_of_overlapped_passes_are_what_each_pass_made_though_buffers_are_reused_before_any_copy_runs():
    server, reqs = Server(), [Req([1, 2, 3]), Req([4, 5])]

    prompt_aux, prompt_logits = server.launch(reqs, is_prefill=True)
    first_aux, first_logits = server.launch(reqs)
    server.commit(reqs, [[7], [8]])
    second_aux, _ = server.launch(reqs)
    server.commit(reqs, [[9, 10], [11]], [2, 1])
    server.commit(reqs, [[12], [13, 14, 15]], [1, 3])
    scheduler_waits, num_run = server.device.num_waits, server.device.num_run
    sent = server.sender.send()

    assert (scheduler_waits, num_run) == (0, 0), "only the sender waits, and nothing was copied before it did"
    assert server.fuse.last_fault == ""
    (prompt, first, second) = sent
    assert np.array_equal(prompt[1][0], prompt_aux.numpy())
    expect_teacher(prompt[1], prompt_logits)
    assert np.array_equal(first[1][0], first_aux[[0, 1, 3]].numpy())
    expect_teacher(first[1], first_logits[[0, 1, 3]])
    assert np.array_equal(second[1][0], second_aux[[0, 3, 4, 5]].numpy())
    assert [header.shape[0] for header in first[0].frames] == [3, 3, 3, 3]


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_rows_keep_the_targets_dtype(dtype: torch.dtype, name: str):
    server, reqs = Server(dtype=dtype), [Req([1, 2, 3])]

    aux_NA, _ = server.launch(reqs, is_prefill=True)
    server.commit(reqs, [[7]])
    ((message, frames),) = server.sender.send()

    assert message.frames[0].dtype == name
    assert torch.equal(torch.from_numpy(frames[0]).view(dtype), aux_NA)


def test_float8_rows_leave_with_their_scales_and_half_the_bytes():
    server, reqs = Server(is_float8=True, dtype=torch.bfloat16), [Req([1, 2, 3])]

    aux_NA, _ = server.launch(reqs, is_prefill=True)
    server.commit(reqs, [[7]])
    ((message, frames),) = server.sender.send()

    assert [header.dtype for header in message.frames] == ["float8_e4m3fn", "int32", "float32", "float32", "float32"]
    decoded = torch.from_numpy(frames[0]).view(torch.float8_e4m3fn).float() * torch.from_numpy(frames[4])[:, None]
    assert torch.allclose(decoded, aux_NA.float(), rtol=1 / 16, atol=1e-4)
    assert frames[0].nbytes == aux_NA.nbytes // 2


def test_the_promised_bytes_are_those_that_are_sent():
    server, reqs = Server(is_float8=True), [Req([1, 2, 3])]
    server.launch(reqs, is_prefill=True)
    server.commit(reqs, [[7]])
    promised = [frames.num_bytes for message, frames in server.sender.offered if isinstance(message, Rows)]

    ((_, frames),) = server.sender.send()

    assert promised == [sum(frame.nbytes for frame in frames)]


def test_few_rows_that_are_here_already_are_gathered_at_the_commit_and_leave_nothing_to_the_sender():
    server, reqs = Server(), [Req([1, 2, 3])]
    server.launch(reqs, is_prefill=True)
    server.commit(reqs, [[7]])
    server.sender.offered.clear()

    aux_NA, logits_MV = server.launch(reqs)
    server.device.synchronize()
    server.commit(reqs, [[8, 9]], [2])

    (_, frames) = server.sender.offered[-1]
    assert np.array_equal(frames[0], aux_NA[:2].numpy())
    expect_teacher(frames, logits_MV[:2])
    assert server.device.num_waits == 1, "for what was done"


@pytest.mark.parametrize("is_float8", [False, True])
def test_a_full_ring_drops_rows_and_counts_them_and_requests_still_start_and_end(monkeypatch, is_float8: bool):
    server, reqs = Server(ring_bytes=1024 + 256 * is_float8, is_float8=is_float8), [Req([1, 2, 3])]

    server.launch(reqs, is_prefill=True)
    monkeypatch.setattr(rows, "teacher_of", None)  # nor does the device make what there is no room for
    monkeypatch.setattr(rows, "pack_rows", None)
    server.launch(reqs)
    server.commit(reqs, [[7]])
    reqs[0].finished_reason = Reason("stop")
    server.commit(reqs, [[9, 10]], [2])
    sent = server.sender.send()

    assert [len(message.segments) for message, _ in sent] == [1]
    assert (server.sender.counters["ring_full"], server.sender.counters["dropped_rows"]) == (1, 2)
    assert server.fuse.last_fault == ""
    assert [type(message) for message, _ in server.sender.offered] == [RequestStarted, RequestEnded]


def test_room_comes_back_when_rows_were_sent_or_their_commit_never_came():
    server, reqs = Server(ring_bytes=1024), [Req([1, 2, 3])]
    server.launch(reqs, is_prefill=True)
    server.commit(reqs, [[7]])
    still_held = list(server.sender.offered)
    server.sender.send()

    server.launch(reqs)
    server.carrier.riders.clear()
    server.launch(reqs)
    server.commit(reqs, [[9]], [1])

    assert len(server.sender.send()) == 1
    assert server.sender.counters["ring_full"] == 0
    assert len(still_held) == 2


def test_the_teacher_of_a_verify_step_is_told_which_rows_were_accepted_and_that_of_a_prefill_takes_all(monkeypatch):
    told, teacher_of = [], rows.teacher_of
    monkeypatch.setattr(rows, "teacher_of", lambda *of: (told.append(of[2]), teacher_of(*of))[1])
    server, reqs = Server(), [Req([1, 2])]

    server.launch(reqs, is_prefill=True)
    server.launch(reqs)

    assert told == [None, ACCEPT_LENS]


def test_a_pass_of_requests_that_are_not_captured_costs_the_device_nothing():
    server = Server()
    reqs = [Req([1, 2], Params(custom_params={"onlinespec": {"capture": False}}))]

    server.launch(reqs, is_prefill=True)
    server.launch(reqs)
    server.commit(reqs, [[7]])
    server.commit(reqs, [[9]], [1])

    assert (server.sender.offered, server.device.num_asked) == ([], 0)
    assert (server.fuse.last_fault, server.sender.counters["ring_full"]) == ("", 0)


def test_nothing_is_taken_while_capture_is_off():
    server, reqs = Server(), [Req([1, 2, 3])]
    server.tap.is_enabled = False

    server.launch(reqs, is_prefill=True)

    assert (server.carrier.riders, server.device.num_asked) == ([], 0)


def test_rows_whose_copy_fails_are_dropped_inside_the_fuse():
    server, reqs = Server(), [Req([1, 2, 3])]
    server.launch(reqs, is_prefill=True)
    server.commit(reqs, [[7]])

    def fail(_work) -> None:
        raise RuntimeError("device gone")

    server.device.finish = fail
    sent = server.sender.send()

    assert [frames for _, frames in sent] == [None]
    assert "device gone" in server.fuse.last_fault
