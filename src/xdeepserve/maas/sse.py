"""The reply of a generation: one JSON object, or Server-Sent Events as the OpenAI SDK reads them.

Nothing is sent before the first output is there, so a refusal by the engine is still a proper HTTP
error. A client that goes away ends the generation at once, streaming or not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xdeepserve.errors import XDeepServeError
from xdeepserve.maas.choice import ChoiceDelta, merge_deltas
from xdeepserve.maas.disconnect import unless_disconnected
from xdeepserve.maas.gateway import Gateway
from xdeepserve.maas.generation import Generation, GenerationPlan, UsageTotals
from xdeepserve.maas.http_errors import ClientGone, error_body, internal_error
from xdeepserve.maas.schema import PromptTokensDetails, UsageInfo

logger = logging.getLogger(__name__)

SEND_TIMEOUT_S = 60.0
"""A client that takes nothing for so long counts as gone."""

DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ReplyFormat(Protocol):
    """How one endpoint writes its objects. Stateful: one per request."""

    def chunks(self, delta: ChoiceDelta) -> Sequence[msgspec.Struct]:
        """Stream objects for what is new in one choice."""
        ...

    def usage_chunk(self, usage: UsageTotals) -> msgspec.Struct | None:
        """The last stream object, if the client asked for usage."""
        ...

    def whole(self, choices: Sequence[ChoiceDelta], usage: UsageTotals) -> msgspec.Struct:
        """The object of a reply that is not streamed."""
        ...


def usage_info(totals: UsageTotals) -> UsageInfo:
    """The `usage` object."""
    return UsageInfo(
        prompt_tokens=totals.num_prompt_tokens,
        completion_tokens=totals.num_output_tokens,
        total_tokens=totals.num_prompt_tokens + totals.num_output_tokens,
        prompt_tokens_details=PromptTokensDetails(totals.num_cached_tokens),
    )


def event(payload: msgspec.Struct) -> bytes:
    """One SSE event."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


class GenerationResponse(Response):
    """Runs a plan and writes its reply."""

    def __init__(
        self,
        *,
        gateway: Gateway,
        plan: GenerationPlan,
        reply: ReplyFormat,
        request_id: str,
        is_stream: bool,
    ) -> None:
        self._gateway = gateway
        self._plan = plan
        self._reply = reply
        self._request_id = request_id
        self._is_stream = is_stream
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._gateway.run(self._plan, self._request_id) as generation:
                write = self._write_stream if self._is_stream else self._write_whole
                writer = BodyWriter(send)
                await unless_disconnected(receive, write(generation, writer), writer.stalled())
        except ClientGone:
            return

    async def _write_whole(self, generation: Generation, writer: BodyWriter) -> None:
        parts: list[list[ChoiceDelta]] = [[] for _ in generation.requests]
        while deltas := await generation.next_deltas():
            for delta in deltas:
                parts[delta.index].append(delta)
        choices = [merge_deltas(part) for part in parts]
        body = msgspec.json.encode(self._reply.whole(choices, generation.usage()))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await writer.start(headers)
        await writer.write(body, is_last=True)

    async def _write_stream(self, generation: Generation, writer: BodyWriter) -> None:
        deltas = await generation.next_deltas()
        await writer.start(_STREAM_HEADERS)
        try:
            while deltas:
                chunks = (chunk for delta in deltas for chunk in self._reply.chunks(delta))
                await writer.write(b"".join(map(event, chunks)))
                deltas = await generation.next_deltas()
            usage = self._reply.usage_chunk(generation.usage())
            tail = DONE if usage is None else event(usage) + DONE
        except XDeepServeError as exc:
            tail = event(error_body(exc))
        except Exception as exc:  # loop top of a stream: the status is already sent
            logger.error("stream %s failed", self._request_id, exc_info=exc)
            tail = event(internal_error(self._request_id))
        await writer.write(tail, is_last=True)


class BodyWriter:
    """Writes the body of one reply. Times it without a timer for each of its many writes."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._begun_s: float | None = None

    async def start(self, headers: list[tuple[bytes, bytes]]) -> None:
        """Status 200 and the headers."""
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, body: bytes, *, is_last: bool = False) -> None:
        """Returns when the client has taken enough of what was written before."""
        self._begun_s = self._loop.time()
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})
        self._begun_s = None

    async def stalled(self) -> None:
        """Returns when a write has taken SEND_TIMEOUT_S, or up to a quarter more."""
        while self._begun_s is None or self._loop.time() - self._begun_s < SEND_TIMEOUT_S:
            await asyncio.sleep(SEND_TIMEOUT_S / 4)
