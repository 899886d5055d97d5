"""EngineClient: all that a gateway may ask of an engine. Down by call, up by async iterator."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from xdeepserve.messages import EngineInfo, GenerateRequest, LoadReport, TokenOutput


class EngineClient(Protocol):
    """One engine (a DP group, or several behind a router), seen from an asyncio frontend.

    Every method is called on the frontend's event loop thread.
    """

    @property
    def info(self) -> EngineInfo:
        """Fixed facts: model name, limits, EOS ids."""
        ...

    def generate(self, *, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        """Submit a request and stream its outputs until one carries `finish_reason`.

        Closing the iterator early (client gone) aborts the request; its KV blocks are free again
        within one engine step.

        Raises:
            CapacityError: the waiting queue is full; nothing was accepted. An engine in another
                process says so at the first read of the stream instead of here.
            RequestError: prompt too long or an id out of range; nothing was accepted.
            EngineDeadError: the engine loop ended before or during the request.
        """
        ...

    async def abort(self, *, request_id: str) -> None:
        """Ask the engine to end a request; its iterator then yields finish_reason abort.

        An unknown or finished id is no error.
        """
        ...

    def load(self) -> LoadReport:
        """Latest snapshot; never blocks."""
        ...

    def is_alive(self) -> bool:
        """Whether the engine loop runs and has made progress lately."""
        ...

    async def close(self, *, drain_timeout_s: float) -> None:
        """Refuse new requests, let running ones finish until the timeout, abort the rest, stop.

        Idempotent.
        """
        ...
