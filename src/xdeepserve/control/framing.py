"""Frames: u32 little-endian length, then one MessagePack envelope.

    +--------+--------+--------+--------+----------------------------+
    | number of bytes that follow, u32  | msgpack [tag, call_id, ...] |
    +--------+--------+--------+--------+----------------------------+

An envelope carries the message of the room above as raw MessagePack, so that this file knows none.
The length is checked before anything is read or allocated.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Final

import msgspec

from xdeepserve.control.envelope import Envelope
from xdeepserve.errors import ProtocolError

DEFAULT_MAX_FRAME_BYTES: Final = 16 << 20
"""A frame holds at most this many bytes; both sides enforce it."""

_LENGTH: Final = struct.Struct("<I")
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final[msgspec.msgpack.Decoder[Envelope]] = msgspec.msgpack.Decoder(Envelope)

# ValueError: a bad UTF-8 string is reported by Python's own decoder.
_BAD_BYTES: Final = (msgspec.DecodeError, ValueError, RecursionError)


def encode_frame(envelope: Envelope, *, max_bytes: int) -> bytes:
    """One envelope as the bytes of one frame.

    Raises:
        ProtocolError: the frame would exceed `max_bytes`.
    """
    payload = _ENCODER.encode(envelope)
    if len(payload) > max_bytes:
        raise ProtocolError(_too_large(len(payload), max_bytes))
    return _LENGTH.pack(len(payload)) + payload


def encode_body(message: msgspec.Struct) -> msgspec.Raw:
    """A message of the room above, ready for an envelope."""
    return msgspec.Raw(_ENCODER.encode(message))


async def read_frame(reader: asyncio.StreamReader, *, max_bytes: int) -> Envelope | None:
    """Read the next envelope; waits as long as the connection lives.

    Returns:
        None at the end of the stream, between two frames.

    Raises:
        ProtocolError: too large, cut off, or not an envelope.
    """
    head = await _read_exactly(reader, _LENGTH.size)
    if not head:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > max_bytes:
        raise ProtocolError(_too_large(length, max_bytes))
    payload = await _read_exactly(reader, length)
    if len(payload) < length:
        raise ProtocolError(f"a frame of {length} bytes ends after 0 bytes")
    try:
        return _DECODER.decode(payload)
    except _BAD_BYTES as exc:
        raise ProtocolError(f"a frame of {length} bytes is no valid envelope: {exc}") from exc


async def _read_exactly(reader: asyncio.StreamReader, length: int) -> bytes:
    """`length` bytes, or nothing when the stream ends before the first of them."""
    try:
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError as exc:
        if exc.partial:
            raise ProtocolError(
                f"the connection ended after {len(exc.partial)} of {length} bytes"
            ) from exc
        return b""


def _too_large(length: int, max_bytes: int) -> str:
    return f"a frame of {length} bytes exceeds max_frame_bytes={max_bytes}; send less at once"


class BodyDecoder:
    """Decodes the messages of one direction.

    Args:
        message_types: a tagged msgspec struct, or a union of several.
    """

    def __init__(self, message_types: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(message_types)

    def decode(self, body: msgspec.Raw) -> Any:
        """One message.

        Raises:
            ProtocolError: not one of the expected types, or with wrong fields.
        """
        try:
            return self._decoder.decode(body)
        except _BAD_BYTES as exc:
            raise ProtocolError(f"an unexpected message: {exc}") from exc
