"""FramedConnection: frames in and out of one asyncio stream, with bounded buffers."""

from __future__ import annotations

import asyncio
from typing import Final

from xdeepserve.control.envelope import Envelope
from xdeepserve.control.framing import encode_frame, read_frame
from xdeepserve.errors import ConnectionLost

_HIGH_WATER_BYTES: Final = 1 << 20
"""`send` waits while more than this is on its way."""

_MAX_UNSENT_BYTES: Final = 64 << 20
"""`post`, which cannot wait, gives the peer up at this."""


class FramedConnection:
    """Both directions of a connection. One task reads; any task may write."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, max_frame_bytes: int
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._max_frame_bytes = max_frame_bytes
        writer.transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)

    @property
    def is_closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self._writer.transport.is_closing()

    async def read(self) -> Envelope | None:
        """The next envelope; None when the peer is gone. Raises ProtocolError on bad bytes."""
        try:
            return await read_frame(self._reader, max_bytes=self._max_frame_bytes)
        except OSError:
            return None

    def post(self, envelope: Envelope) -> None:
        """Send without waiting, in order with all other sending.

        Raises:
            ProtocolError: the envelope is too large; nothing was sent.
            ConnectionLost: the connection is closed, or the peer does not read.
        """
        frame = encode_frame(envelope, max_bytes=self._max_frame_bytes)
        if self.is_closed:
            raise ConnectionLost("the connection is closed")
        unsent = self._writer.transport.get_write_buffer_size()
        if unsent > _MAX_UNSENT_BYTES:
            self.abort()
            raise ConnectionLost(
                f"the peer does not read: {unsent} bytes wait, the limit is {_MAX_UNSENT_BYTES}"
            )
        self._writer.write(frame)

    async def send(self, envelope: Envelope, *, timeout_s: float) -> None:
        """Send, and wait until the peer has taken enough of what was sent before.

        Raises:
            ProtocolError: the envelope is too large; nothing was sent.
            ConnectionLost: the connection is closed, or the peer took nothing until the timeout.
        """
        self.post(envelope)
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.drain()
        except TimeoutError:
            self.abort()
            raise ConnectionLost(f"the peer read nothing for {timeout_s} s") from None
        except OSError as exc:
            raise ConnectionLost(f"the connection broke: {exc}") from exc

    def abort(self) -> None:
        """Close now; what is unsent is lost. The reading task sees the end."""
        self._writer.transport.abort()

    async def close(self, *, timeout_s: float) -> None:
        """Send what is buffered, then close; at the timeout close all the same."""
        self._writer.close()
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.wait_closed()
        except (TimeoutError, OSError):
            self.abort()
