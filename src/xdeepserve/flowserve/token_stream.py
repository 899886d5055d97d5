"""TokenStream: the outputs of one request on their way to an asyncio reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable

from xdeepserve.errors import XDeepServeError
from xdeepserve.messages import TokenOutput


class TokenStream(AsyncIterator[TokenOutput]):
    """The outputs of one request. Closing it before the terminal output aborts the request."""

    def __init__(self, request_id: str, *, abort: Callable[[str], None]) -> None:
        """Make a stream without outputs.

        Args:
            request_id: passed to `abort`.
            abort: asks the engine to end the request; must not block or raise.
        """
        self._request_id = request_id
        self._abort = abort
        self._error: XDeepServeError | None = None
        self._outputs: deque[TokenOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_finished = False
        self._is_closed = False

    def push(self, output: TokenOutput) -> None:
        """Add an output and wake the reader. Called by the client on the event loop."""
        if self._is_closed:
            return
        self._outputs.append(output)
        self._wake()

    def fail(self, error: XDeepServeError) -> None:
        """End the stream with an error, after the outputs it has; nothing is left to abort."""
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def __anext__(self) -> TokenOutput:
        """The next output; StopAsyncIteration after the terminal one, an error or `aclose`."""
        if self._is_finished or self._is_closed:
            raise StopAsyncIteration
        while not self._outputs:
            if self._error is not None:
                self._is_finished = True
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self._abandon()
                raise
            finally:
                self._waiter = None
        output = self._outputs.popleft()
        self._is_finished = output.finish_reason is not None
        return output

    async def aclose(self) -> None:
        """Stop reading; aborts the request unless it is finished. Idempotent."""
        self._abandon()

    def _abandon(self) -> None:
        if not (self._is_closed or self._is_finished or self._error is not None):
            self._abort(self._request_id)
        self._is_closed = True
        self._outputs.clear()

    def __del__(self) -> None:
        # A reader that forgot aclose() must not keep KV blocks until max_tokens.
        self._abandon()
