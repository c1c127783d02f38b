"""Every message there is, through bytes and back; bytes that are no message."""

import contextlib
import types
import typing
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onlinespec.errors import WireError
from onlinespec.wire.messages import (
    Ack,
    ControlReply,
    ControlRequest,
    GetHello,
    GetStatus,
    Heartbeat,
    RequestEnded,
    SampleMessage,
    SetCapture,
    StartSwitchback,
    Swap,
    decode_reply,
    decode_request,
    decode_sample,
    encode,
)

QUICK = settings(max_examples=80, deadline=None, derandomize=True, database=None)
DECODERS = {SampleMessage: decode_sample, ControlRequest: decode_request, ControlReply: decode_reply}
SCALARS: dict[Any, st.SearchStrategy] = {
    int: st.integers(-(2**63), 2**64 - 1),
    str: st.text(max_size=8),
    bool: st.booleans(),
    type(None): st.none(),
    float: st.floats(0, 1) | st.floats(allow_nan=False),
}


def values_of(kind: Any) -> st.SearchStrategy:
    """Hypothesis values of a message type, from its annotations."""
    if kind in SCALARS:
        return SCALARS[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values_of(arg) for arg in args])
    if origin is typing.Annotated:
        bounds, draw = args[1], st.integers if args[0] is int else st.floats
        return draw(bounds.ge, bounds.le)
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(values_of(args[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(values_of(args[0]), values_of(args[1]), max_size=3)
    return st.builds(kind, **{field.name: values_of(field.type) for field in msgspec.structs.fields(kind)})


@pytest.mark.parametrize(("kind", "decode"), DECODERS.items(), ids=["sample", "request", "reply"])
def test_every_message_is_decoded_as_what_was_encoded(kind: Any, decode):
    @QUICK
    @given(values_of(kind))
    def round_trip(message: msgspec.Struct):
        assert decode(encode(message)) == message

    round_trip()


@pytest.mark.parametrize("decode", DECODERS.values())
def test_any_bytes_are_a_message_or_a_wire_error(decode):
    @QUICK
    @given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda tail: encode(GetHello())[:-3] + tail))
    def decode_noise(data: bytes):
        with contextlib.suppress(WireError):  # any other exception fails
            message = decode(data)
            assert decode(encode(message)) == message

    decode_noise()


def test_a_message_cut_short_or_with_a_tail_is_refused_at_every_length():
    data = encode(RequestEnded(3, "stop", 4, 5, 6, 7.0))

    for end in range(len(data)):
        with pytest.raises(WireError, match=f"{end} bytes are no sample message"):
            decode_sample(data[:end])
    with pytest.raises(WireError, match=r"trailing"):
        decode_sample(data + b"\x00")


DAMAGED = {
    "a message of the other stream": encode(Swap(1, "p", "d")),
    "an unknown type": msgspec.msgpack.encode({"type": "Shutdown"}),
    "no type": msgspec.msgpack.encode({"version": 1}),
    "a field missing": msgspec.msgpack.encode({"type": "Heartbeat", "version": 1}),
    "a field of another type": msgspec.msgpack.encode({"type": "Heartbeat", "version": "1", "counters": {}}),
    "text that is not UTF-8": b"\x81\xa4type\xa9\xff\xfeartbeat",
    "nesting without end": b"\x82\xa4type\xa9Heartbeat\xa1x" + b"\x91" * 100_000,
    "nothing": b"",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_sample_message_is_a_wire_error_that_says_how_much_came(data: bytes):
    with pytest.raises(WireError, match=f"^{len(data)} bytes are no sample message: "):
        decode_sample(data)


def test_a_field_from_a_newer_sender_is_ignored():
    newer = msgspec.msgpack.encode({"type": "Heartbeat", "version": 1, "counters": {"rows": 2}, "load": 0.5})

    assert decode_sample(newer) == Heartbeat(1, {"rows": 2})


def test_each_stream_decodes_its_own_messages_only():
    assert decode_request(encode(GetStatus())) == GetStatus()
    assert decode_reply(encode(Ack(False, "no"))) == Ack(False, "no")

    with pytest.raises(WireError, match="control reply"):
        decode_reply(encode(SetCapture(True)))
    with pytest.raises(WireError, match="control request"):
        decode_request(encode(Ack(True)))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_of_requests_that_is_none_is_refused(share: float):
    with pytest.raises(WireError, match="control request"):
        decode_request(encode(SetCapture(True, share)))


@pytest.mark.parametrize("change", [{"block_steps": 2}, {"num_pairs": 0}, {"seed": -1}])
def test_a_switchback_that_could_compare_nothing_is_refused(change: dict[str, int]):
    sound = StartSwitchback(2, "p", "d", block_steps=3, num_pairs=1, seed=0)
    assert decode_request(encode(sound)) == sound

    with pytest.raises(WireError, match=next(iter(change))):
        decode_request(encode(msgspec.structs.replace(sound, **change)))


def test_to_switch_capture_without_a_share_leaves_it_as_it_is():
    older = msgspec.msgpack.encode({"type": "SetCapture", "enabled": False})

    assert decode_request(older) == SetCapture(False, None)
