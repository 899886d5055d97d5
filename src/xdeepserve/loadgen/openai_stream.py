"""OpenAI's streamed answers: SSE frames split from bytes, chunks decoded to the few fields needed.

Bytes in, typed chunks out. msgspec skips the fields that are not named here without building
objects for them, so a token costs far less here than the system call that read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Final

import msgspec

from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import BrokenResponse, ClientError

MAX_EVENT_BYTES: Final = 4 << 20
_DONE: Final = b"[DONE]"


class Delta(msgspec.Struct, gc=False):
    """New text of a chat choice; reasoning models stream their thoughts in a field of their own."""

    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct, gc=False):
    """One choice of a chunk: `text` on completions, `delta` on chat."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def new_text(self) -> str:
        """Text that this chunk adds, on either endpoint."""
        if self.text:
            return self.text
        if self.delta is None:
            return ""
        return self.delta.content or self.delta.reasoning_content or ""

    @property
    def has_token(self) -> bool:
        """Whether the chunk reports output: text, or (completions) a token without text yet.

        A chat chunk with only the role and a last chunk with only the finish reason do not.
        """
        if self.new_text:
            return True
        return self.text is not None and self.finish_reason is None


class PromptTokensDetails(msgspec.Struct, gc=False):
    """Part of the prompt that came from the prefix cache."""

    cached_tokens: int | None = None


class UsageReport(msgspec.Struct, gc=False):
    """The server's own token counts, sent once at the end."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int:
        details = self.prompt_tokens_details
        return 0 if details is None else details.cached_tokens or 0


class StreamError(msgspec.Struct, gc=False):
    """An error reported in the middle of a stream."""

    message: str = "the server reported an error without a message"


class Chunk(msgspec.Struct, gc=False):
    """One `data:` frame."""

    choices: list[Choice] = []
    usage: UsageReport | None = None
    error: StreamError | str | None = None


class StreamFailed(ClientError):
    """The server reported an error inside a stream that had begun with status 200."""


class SseSplitter:
    """Cuts a byte stream into the payloads of its `data:` frames, wherever the reads end."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Payloads completed by `data`, in order; comments and other fields are skipped.

        Raises:
            BrokenResponse: an event without an end.
        """
        buffer = self._rest + data
        if b"\r" in buffer:
            buffer = buffer.replace(b"\r\n", b"\n")
        *frames, self._rest = buffer.split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise BrokenResponse(f"an SSE event is longer than {MAX_EVENT_BYTES} bytes")
        return [payload for frame in frames if (payload := _payload(frame))]


def _payload(frame: bytes) -> bytes:
    if frame.startswith(b"data: ") and b"\n" not in frame:
        return frame[6:]
    lines = (line.removeprefix(b"data:") for line in frame.split(b"\n") if line[:5] == b"data:")
    return b"\n".join(line.removeprefix(b" ") for line in lines)


_decoder: Final = msgspec.json.Decoder(Chunk)


def decode_chunk(payload: bytes) -> Chunk:
    """Raises BrokenResponse for anything but a chunk, StreamFailed for an error chunk."""
    try:
        chunk = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise BrokenResponse(f"a chunk is not what OpenAI's API sends: {exc}") from exc
    if chunk.error is not None:
        error = chunk.error
        raise StreamFailed(error if isinstance(error, str) else error.message)
    return chunk


async def stream_chunks(client: HttpClient, path: str, body: object) -> AsyncGenerator[list[Chunk]]:
    """Post `body` and yield the chunks of the answer, together those that arrive together.

    Closing the generator early aborts the request (use `contextlib.aclosing`).

    Raises:
        ClientError: no answer, an error answer, or a stream that ends without `[DONE]`.
    """
    splitter = SseSplitter()
    is_done = False
    async with contextlib.aclosing(client.stream(path, body)) as pieces:
        async for piece in pieces:
            payloads = splitter.feed(piece)
            if payloads and payloads[-1] == _DONE:
                is_done = True
                payloads.pop()
            if payloads:
                yield [decode_chunk(payload) for payload in payloads]
    if not is_done:
        raise BrokenResponse("the stream ended without [DONE]")


class _ModelCard(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


async def first_model(client: HttpClient) -> str:
    """Id of the first model the server lists.

    Raises:
        ClientError: unreachable, or no usable list.
    """
    body = await client.get("/v1/models")
    try:
        listed = msgspec.json.decode(body, type=_ModelList).data
    except msgspec.MsgspecError as exc:
        raise BrokenResponse(f"/v1/models is not a model list: {exc}") from exc
    if not listed:
        raise BrokenResponse("/v1/models lists no model; name one with --model")
    return listed[0].id
