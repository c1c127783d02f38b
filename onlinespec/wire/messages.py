"""Messages, in the order data flows: server -> sidecar (samples), then commands -> server (control).

Samples may be lost: every loss is counted by its sender and told in the next `Heartbeat`. Control is
acknowledged: a request gets exactly one `Ack`. Encoding is msgpack by msgspec; tensors travel beside the
message as raw frames (see `frames`). Nothing is pickled.
"""

import itertools
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from onlinespec.errors import WireError
from onlinespec.wire.frames import FrameHeader


class Hello(msgspec.Struct, tag=True, frozen=True):
    """The plugin is attached: what it found in the server. First answer on the control socket."""

    sglang_version: str
    sites: list[str]
    """names of the declared sites that SGLang really attached"""
    vocab_size: int
    hidden_size: int
    """width of one captured hidden state"""
    num_aux: int
    """captured hidden states per row"""
    num_draft_steps: int
    """the greatest depth there is; the one of now is `depth`"""
    greedy_verify: bool
    """True where the verifier is greedy whatever the request's temperature (CPU)"""
    capture: bool
    capture_refused: str
    """why rows are not captured; empty when they are"""
    version: int
    """draft version in service; in a switchback the incumbent"""
    generation_prompt: list[int]
    """tokens the chat template writes before an answer; empty where there is no template"""
    depth: int = 0
    """draft steps, those of a `SetDepth` for some steps left out; 0 means that nothing is drafted"""
    depths: list[int] = []
    """what `SetDepth` may choose from; one where the depth is fixed"""
    depth_refused: str = ""
    """why the depth is fixed; empty where it is not"""


class RequestStarted(msgspec.Struct, tag=True, frozen=True):
    """A request delivered its first rows."""

    request: int
    """our own number, unique in a server's life"""
    tenant: str
    prompt_tokens: list[int]
    cached_tokens: int
    """prompt positions [0, cached_tokens) have no rows: the server had them in its prefix cache"""
    temperature: float
    """effective for verification: 0 means greedy"""
    top_k: int
    top_p: float
    time_s: float
    """wall clock of the server"""
    target_updates: int = 0
    """see `Status.target_updates`: as it was then"""


class Segment(msgspec.Struct, array_like=True, frozen=True):
    """The rows of one request in one forward pass. Its rows are consecutive positions."""

    request: int
    is_verify: bool
    position: int
    """position of the first row"""
    num_rows: int
    tokens: list[int]
    """tokens this pass committed; the first stands at `token_position`"""
    token_position: int
    num_teacher_rows: int
    """the last so many rows have a teacher"""
    num_drafted: int
    """tokens drafted for this verify step; 0 for prefill, and at depth 0"""
    num_correct: int
    """drafted tokens the verifier accepted, before truncation by a stop"""
    version: int
    """draft that drafted this step; 0 for prefill"""
    is_mixed: bool
    """first verify after a swap: its first drafted token is still the old draft's"""


class Rows(msgspec.Struct, tag=True, frozen=True):
    """The committed rows of one forward pass, request after request.

    Frames, in order: aux [N, A*D]; teacher_ids int32 [M, k]; teacher_logits float32 [M, k];
    teacher_lse float32 [M], where N sums num_rows and M num_teacher_rows over the segments. Where aux is
    float8_e4m3fn, its scales follow: float32 [N], powers of two, and a row is aux times its scale.
    """

    segments: list[Segment]
    frames: list[FrameHeader]


class RequestEnded(msgspec.Struct, tag=True, frozen=True):
    """A request finished or was aborted. Its counters are SGLang's own."""

    request: int
    reason: str
    num_verify_steps: int
    num_correct_drafts: int
    num_output_tokens: int
    time_s: float
    target_updates: int = 0
    """see `Status.target_updates`: as it was then"""


class BlockEnded(msgspec.Struct, tag=True, frozen=True):
    """A whole block of a switchback; one that was cut short is not told.

    The first step of each block is left out, whether the version changed there or not: its first drafted
    tokens are those of the block before, and blocks must be alike. Requests are counted once per step, so
    num_tokens / num_requests is the accept length and num_requests / num_steps the mean of running requests.
    """

    candidate: int
    """version on trial; with `seed` it names the switchback"""
    seed: int
    pair: int
    index: int
    """0 or 1: first or second of its pair"""
    version: int
    """that drafted"""
    num_draft_steps: int
    num_steps: int
    """decode steps whose tokens were counted"""
    num_tokens: int
    """that they committed, over all requests"""
    num_requests: int
    num_timed_steps: int
    """of these, the ones followed by another step of the block with no prefill, pause or idleness between"""
    num_timed_tokens: int
    wall_us: int
    """of the timed steps: from one decode iteration of the scheduler to the next"""


class Heartbeat(msgspec.Struct, tag=True, frozen=True):
    """Counters since the server started, and running_requests, the number there are now; sent about once a second.

    `decode_{steps,tokens,requests,us}_d<depth>_b<load>` are what comparable decode steps cost and brought, by draft
    depth and by batch size rounded up to a power of two, in microseconds; `decode_us / decode_steps` is the cost
    of a step. `target_updates` are updates of the target's weights.
    """

    version: int
    """in service; in a switchback the incumbent"""
    counters: dict[str, int]


SampleMessage = Hello | RequestStarted | Rows | RequestEnded | BlockEnded | Heartbeat


class GetHello(msgspec.Struct, tag=True, frozen=True):
    """Ask for `Hello`."""


class GetStatus(msgspec.Struct, tag=True, frozen=True):
    """Ask for the counters and the version in service."""


class Swap(msgspec.Struct, tag=True, frozen=True):
    """Put a version in service between two iterations."""

    version: int
    path: str
    """directory of the version"""
    digest: str
    """of its model.safetensors; the server refuses other bytes"""


class SetCapture(msgspec.Struct, tag=True, frozen=True):
    """Switch the tap, and say of how many requests it takes rows."""

    enabled: bool | None = None
    """None leaves it as it is"""
    sample_frac: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    """share of requests, from those on that are seen next; None leaves it as it is"""


class StartSwitchback(msgspec.Struct, tag=True, frozen=True):
    """Let a candidate and the version in service draft in turns: pairs of adjacent blocks, their order tossed.

    Ends after `num_pairs`, on `StopSwitchback`, at a `Swap`, and when anything fails; always with the version
    that was in service. Sent again while it runs it changes nothing.
    """

    version: int
    """the candidate"""
    path: str
    digest: str
    block_steps: Annotated[int, msgspec.Meta(ge=3, le=1_000_000)]
    """decode steps of a block; the first is not counted, the last not timed"""
    num_pairs: Annotated[int, msgspec.Meta(ge=1, le=100_000)]
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    """of the coins"""


class StopSwitchback(msgspec.Struct, tag=True, frozen=True):
    """End the switchback; nothing where none runs."""


class SetDepth(msgspec.Struct, tag=True, frozen=True):
    """Draft so many tokens per verify step from the next one on; ends a switchback where it changes anything.

    for_steps: decode steps after which the server returns by itself to the depth it had; 0: until told.
    """

    num_steps: Annotated[int, msgspec.Meta(ge=0, le=64)]
    for_steps: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0


class RenewPrefixes(msgspec.Struct, tag=True, frozen=True):
    """Let requests from now on share no cached prefix with those before: their draft KV is the draft's in service."""


EMBEDDING_TENSOR = "embed_tokens.weight"
"""its name in what `ExportEmbedding` writes"""


class ExportEmbedding(msgspec.Struct, tag=True, frozen=True):
    """Write the target's embedding table as it is now, which the draft reads too.

    Every rank writes its rows of the vocabulary, [V, D] in all, into one safetensors file of the directory, named so
    that the files sort in the order of their rows; the tensor is `EMBEDDING_TENSOR`.
    """

    directory: str
    """exists, and is empty"""


ControlRequest = (
    GetHello
    | GetStatus
    | Swap
    | SetCapture
    | StartSwitchback
    | StopSwitchback
    | SetDepth
    | RenewPrefixes
    | ExportEmbedding
)


class Status(msgspec.Struct, tag=True, frozen=True):
    """State of the plugin."""

    version: int
    """in service; in a switchback the incumbent"""
    num_swaps: int
    capture: bool
    fuse: Literal["closed", "open", "half-open"]
    last_fault: str
    counters: dict[str, int]
    sample_frac: float = 1.0
    """share of requests that are captured while `capture` is on"""
    switchback: int = 0
    """candidate that takes turns with `version`; 0 where no switchback runs"""
    depth: int = 0
    """draft steps of the next decode step"""
    depths: list[int] = []
    """what `SetDepth` may choose from"""
    prefix_generation: int = 0
    """how often cached prefixes were set apart since the start"""
    target_updates: int = 0
    """updates of the target's weights begun since the start; one that failed may have written a part"""


class Ack(msgspec.Struct, tag=True, frozen=True):
    """The one answer to a request that changes something."""

    is_ok: bool
    message: str = ""
    """why not; empty when ok"""
    version: int = 0
    """draft in service after the request"""
    duration_s: float = 0.0
    """time the scheduler spent in the copy"""


ControlReply = Hello | Status | Ack

_encoder = msgspec.msgpack.Encoder()
_samples = msgspec.msgpack.Decoder(SampleMessage)
_batches = msgspec.msgpack.Decoder(list[tuple[bytes, list[Annotated[int, msgspec.Meta(ge=0)]]]])
_requests = msgspec.msgpack.Decoder(ControlRequest)
_replies = msgspec.msgpack.Decoder(ControlReply)


def encode(message: msgspec.Struct) -> bytes:
    """Msgpack bytes of any message here."""
    return _encoder.encode(message)


def decode_sample(data: bytes) -> SampleMessage:
    """Raises: WireError where the bytes are no sample message."""
    return _decode(_samples, data, "sample message")


def encode_batch(heads: Sequence[tuple[bytes, list[int]]]) -> bytes:
    """(encoded message, sizes of its frames in bytes) of messages that travel together."""
    return _encoder.encode(heads)


def messages_of(heads: bytes, bodies: Sequence[memoryview]) -> list[tuple[bytes, list[memoryview]]]:
    """(encoded message, frames) of each in a batch. bodies: the frames, or one with all of them joined.

    Raises: WireError where the bytes are no batch, or its frames are not those that it names.
    """
    found = _decode(_batches, heads, "batch of sample messages")
    sizes = [size for _, own in found for size in own]
    if len(bodies) == 1:
        ends = list(itertools.accumulate(sizes))
        joined = bodies[0]
        frames = [joined[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        is_whole = joined.nbytes == sum(sizes)
    else:
        frames, is_whole = list(bodies), [body.nbytes for body in bodies] == sizes
    if not is_whole:
        told = ", ".join(str(body.nbytes) for body in bodies) or "none"
        raise WireError(f"a batch names {len(sizes)} frames of {sum(sizes)} bytes, and these came: {told}")
    taken = iter(frames)
    return [(head, list(itertools.islice(taken, len(own)))) for head, own in found]


def decode_request(data: bytes) -> ControlRequest:
    """Raises: WireError where the bytes are no control request."""
    return _decode(_requests, data, "control request")


def decode_reply(data: bytes) -> ControlReply:
    """Raises: WireError where the bytes are no control reply."""
    return _decode(_replies, data, "control reply")


def _decode(decoder, data: bytes, wanted: str):
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{len(data)} bytes are no {wanted}: {error}") from error
