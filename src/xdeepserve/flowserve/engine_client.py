"""InProcClient: the asyncio face of a DP group in the same process.

    event loop: generate -> group.submit --> [step loop] --> outbox -> _deliver -> TokenStream

A step's outputs cross to the event loop together, with one wake-up, not one per token.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import Final

from xdeepserve.errors import RequestError, XDeepServeError
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.token_stream import TokenStream
from xdeepserve.flowserve.validation import validate_request
from xdeepserve.messages import EngineInfo, GenerateRequest, LoadReport, TokenOutput

logger = logging.getLogger(__name__)

_JOIN_MARGIN_S: Final = 60.0
"""How long after the drain timeout the step loop may take to end its last step."""


class InProcClient:
    """EngineClient over a DP group's thread. All methods run on one event loop."""

    def __init__(self, group: DPGroup) -> None:
        self._group = group
        # Weak, so that a stream nobody reads any more is collected and aborts its request.
        self._streams: dict[str, weakref.ref[TokenStream]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Warm up the executor and start the step loop. Blocks while warming up."""
        self._group.start(self._on_outputs)

    @property
    def info(self) -> EngineInfo:
        """Fixed facts of the engine."""
        return self._group.info

    def generate(self, *, request: GenerateRequest) -> TokenStream:
        """Submit a request; see EngineClient.generate. Errors are raised here, not by reading."""
        validate_request(request, self._group.info)
        if request.request_id in self._streams:
            raise RequestError(f"request_id={request.request_id!r} is already in use")
        self._bind_loop()
        self._group.submit(request)
        stream = TokenStream(request.request_id, abort=self._group.abort)
        self._streams[request.request_id] = weakref.ref(stream)
        return stream

    def _bind_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        if self._loop is not None and not self._loop.is_closed():
            raise XDeepServeError("the engine client is already bound to another event loop")
        # Streams of a closed loop can never be read again.
        for request_id in self._streams:
            self._group.abort(request_id)
        self._streams.clear()
        self._loop = loop

    def _on_outputs(self, outputs: list[TokenOutput]) -> None:
        """Outbox of the group; runs on the step loop's thread."""
        loop = self._loop
        assert loop is not None, "outputs come after the first request"
        try:
            loop.call_soon_threadsafe(self._deliver, outputs)
        except RuntimeError:
            logger.warning("event loop closed: %d outputs have no reader", len(outputs))

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            reference = self._streams.get(output.request_id)
            stream = None if reference is None else reference()
            if output.finish_reason is not None:
                self._streams.pop(output.request_id, None)
            if stream is not None:
                stream.push(output)

    async def abort(self, *, request_id: str) -> None:
        """Ask for a request's end; see EngineClient.abort."""
        self._group.abort(request_id)

    def load(self) -> LoadReport:
        """Latest snapshot; never blocks."""
        return self._group.load()

    def is_alive(self) -> bool:
        """Whether the step loop runs and has made progress lately."""
        return self._group.is_alive()

    async def close(self, *, drain_timeout_s: float) -> None:
        """Refuse new requests, drain, abort the rest, stop the loop. Idempotent."""
        self._group.begin_close(drain_timeout_s=drain_timeout_s)
        timeout_s = drain_timeout_s + _JOIN_MARGIN_S
        if not await asyncio.to_thread(self._group.join, timeout_s=timeout_s):
            logger.error("the step loop did not end within %.0f s of closing", timeout_s)
