"""Frames: whatever bytes arrive, in whatever pieces, the reader gets messages or a typed error."""

from __future__ import annotations

import asyncio
import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdeepserve.control.envelope import (
    Call,
    Cancel,
    Envelope,
    Failure,
    Notice,
    Ping,
    RemoteError,
    Reply,
    to_local,
    to_remote,
)
from xdeepserve.control.framing import encode_frame, read_frame
from xdeepserve.errors import CapacityError, ProtocolError, RequestError, XDeepServeError

MAX_BYTES = 1000

bodies = st.binary(max_size=50).map(lambda b: msgspec.Raw(msgspec.msgpack.encode(b)))
ids = st.integers(0, 2**63)
envelopes = st.one_of(
    st.builds(Call, ids, bodies),
    st.builds(Reply, ids, bodies),
    st.builds(Notice, bodies),
    st.builds(Cancel, ids),
    st.builds(Ping, ids),
    st.builds(Failure, ids, st.builds(RemoteError, st.text(), st.text())),
)


async def read_all(data: bytes) -> list[Envelope]:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    found = []
    while (envelope := await read_frame(reader, max_bytes=MAX_BYTES)) is not None:
        found.append(envelope)
    return found


@given(st.lists(envelopes, max_size=5))
def test_what_is_written_is_read(sent: list[Envelope]) -> None:
    data = b"".join(encode_frame(envelope, max_bytes=MAX_BYTES) for envelope in sent)
    assert asyncio.run(read_all(data)) == sent


@given(envelopes, st.data())
def test_a_cut_frame_is_an_error_and_never_a_message(sent: Envelope, data: st.DataObject) -> None:
    frame = encode_frame(sent, max_bytes=MAX_BYTES)
    cut = data.draw(st.integers(1, len(frame) - 1))
    with pytest.raises(ProtocolError, match=r"ended after|ends after"):
        asyncio.run(read_all(frame[:cut]))


@given(st.binary(max_size=200))
def test_garbage_is_a_typed_error(garbage: bytes) -> None:
    frame = struct.pack("<I", len(garbage)) + garbage
    with contextlib.suppress(ProtocolError):
        assert all(isinstance(e, Envelope) for e in asyncio.run(read_all(frame)))


async def test_deeply_nested_bytes_are_a_typed_error() -> None:
    bomb = b"\x93\xa4call\x01" + b"\x91" * 900 + b"\x01"
    with pytest.raises(ProtocolError):
        await read_all(struct.pack("<I", 30_000) + b"\x91" * 30_000)
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack("<I", len(bomb)) + bomb)
    # The body is not parsed here, so its depth does no harm yet.
    assert isinstance(await read_frame(reader, max_bytes=MAX_BYTES), Call)


async def test_an_oversized_frame_is_refused_before_it_is_read() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(struct.pack("<I", MAX_BYTES + 1))
    with pytest.raises(ProtocolError, match=f"max_frame_bytes={MAX_BYTES}"):
        await read_frame(reader, max_bytes=MAX_BYTES)


def test_an_oversized_message_is_not_sent() -> None:
    notice = Notice(msgspec.Raw(msgspec.msgpack.encode(b"x" * MAX_BYTES)))
    with pytest.raises(ProtocolError, match=str(MAX_BYTES)):
        encode_frame(notice, max_bytes=MAX_BYTES)


@pytest.mark.parametrize(
    "error", [RequestError("wrong", code="c", param="p"), CapacityError("full")]
)
def test_typed_errors_survive_the_border(error: XDeepServeError) -> None:
    there = to_local(to_remote(error))
    assert type(there) is type(error)
    assert (there.message, there.code, there.param) == (error.message, error.code, error.param)


def test_foreign_errors_tell_only_their_type() -> None:
    there = to_local(to_remote(ValueError("a secret")))
    assert type(there) is XDeepServeError
    assert "ValueError" in there.message
    assert "secret" not in there.message
