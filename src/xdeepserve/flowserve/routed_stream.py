"""RoutedStream: the outputs of one request, whichever DP groups make them.

             place               output                    terminal output
SEARCHING ----------> PLACED ------------> (to the client) ----------------> OVER
    ^                    |
    +--------------------+  the group died, or gave the request up unasked
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from xdeepserve.clock import Clock
from xdeepserve.engine_api import EngineClient
from xdeepserve.errors import CapacityError, EngineDeadError
from xdeepserve.flowserve.replay import Loss, Progress, ReplayPolicy
from xdeepserve.messages import FinishReason, GenerateRequest, TokenOutput

logger = logging.getLogger(__name__)


class Placement(NamedTuple):
    """A request at one engine."""

    member_name: str
    engine: EngineClient
    # The id under which the engine knows the request.
    request_id: str
    outputs: AsyncIterator[TokenOutput]


class Placer(Protocol):
    """What a stream needs of its router."""

    def digests(self, request: GenerateRequest) -> Sequence[bytes]:
        """What `place` asks for; hashes all of the request's tokens."""
        ...

    def place(
        self,
        request: GenerateRequest,
        *,
        digests: Sequence[bytes],
        avoid: frozenset[str],
        is_suspect: bool,
    ) -> Placement | None:
        """Submit to the best group that is not in `avoid`.

        Returns:
            None when it is a suspect's turn later: each of those groups has another one.

        Raises:
            CapacityError: every group that is there is full or avoided.
            EngineDeadError: none is there.
        """
        ...

    def on_moved(self, stream: RoutedStream, placement: Placement | None) -> None:
        """The stream is at another group now, or at none."""
        ...

    def on_over(self, stream: RoutedStream) -> None:
        """The stream is at no group and will be at none."""
        ...

    def note_loss(self, stream: RoutedStream, member_name: str) -> Loss:
        """The stream's request was lost with its group, and was not moved yet."""
        ...


class RoutedStream(AsyncIterator[TokenOutput]):
    """One request's outputs without a seam. Closing it before the end aborts the request."""

    def __init__(
        self, request: GenerateRequest, *, placer: Placer, policy: ReplayPolicy, clock: Clock
    ) -> None:
        self.request_id = request.request_id
        self._progress = Progress(request)
        self._placer = placer
        self._policy = policy
        self._clock = clock
        self._placement: Placement | None = None
        # Groups that said they are full since the request last ran somewhere.
        self._full: set[str] = set()
        self._was_accepted = False
        self._is_abort_asked = False
        self._is_over = False
        # Of the tokens so far; None = some have come since.
        self._digests: Sequence[bytes] | None = None
        self._begin_search()

    def try_place(self) -> None:
        """Submit to a group now; raises what `Placer.place` raises."""
        self._place()

    async def __anext__(self) -> TokenOutput:
        """The next output; StopAsyncIteration after the terminal one or `aclose`."""
        while not self._is_over:
            if self._placement is None:
                if (ended := await self._search()) is not None:
                    return ended
                continue
            output = await self._read(self._placement)
            if output is not None:
                return self._pass_on(output)
        raise StopAsyncIteration

    async def ask_abort(self) -> None:
        """End the request; an abort that its group then reports is the client's."""
        self._is_abort_asked = True
        await self.give_up_place()

    async def give_up_place(self) -> None:
        """Make the group end its part. Unless the client asked for that, another group goes on."""
        if (placement := self._placement) is not None:
            await placement.engine.abort(request_id=placement.request_id)

    async def aclose(self) -> None:
        """Stop reading; aborts the request unless it is over. Idempotent."""
        if not self._is_over:
            placement = self._placement
            self._finish()
            if placement is not None:
                await placement.engine.abort(request_id=placement.request_id)

    def _finish(self) -> None:
        self._placement = None
        self._is_over = True
        self._placer.on_over(self)

    # -- placed ---------------------------------------------------------------------------------

    async def _read(self, placement: Placement) -> TokenOutput | None:
        """The next output of the group, or None when the request has to move."""
        try:
            output = await anext(placement.outputs)
        except asyncio.CancelledError:
            await self.aclose()
            raise
        except CapacityError:
            self._full.add(placement.member_name)
            self._leave()
            return None
        except (EngineDeadError, StopAsyncIteration) as exc:
            self._lose(placement, str(exc) or "its stream ended without a terminal output")
            return None
        if self._is_interrupted(output):
            self._lose(placement, output.error or "the group aborted the request")
            return None
        return output

    def _is_interrupted(self, output: TokenOutput) -> bool:
        """Whether this last output is the group's end and not the request's."""
        match output.finish_reason:
            case FinishReason.ABORT:
                return not self._is_abort_asked
            case FinishReason.ERROR:
                # Errors of the request itself were found before it was accepted.
                return True
            case _:
                return False

    def _pass_on(self, output: TokenOutput) -> TokenOutput:
        self._was_accepted = True
        self._full.clear()
        self._digests = None
        if output.finish_reason is not None:
            self._finish()
        return self._progress.pass_on(output)

    def _lose(self, placement: Placement, reason: str) -> None:
        """Leave a group that did not finish the request."""
        self._was_accepted = True
        self._progress.note_loss(self._placer.note_loss(self, placement.member_name), reason)
        logger.info("%s leaves %s: %s", self.request_id, placement.member_name, reason)
        # Not for a refusal: that is part of the search.
        self._begin_search()
        self._leave()

    def _leave(self) -> None:
        self._placement = None
        self._placer.on_moved(self, None)

    # -- searching ------------------------------------------------------------------------------

    @property
    def is_homeless(self) -> bool:
        """Whether the request waits for a group."""
        return self._placement is None and not self._is_over

    @property
    def is_suspect(self) -> bool:
        """Whether the request may be what ended its groups."""
        return self._progress.is_suspect(self._policy)

    @property
    def priority(self) -> int:
        """Of the request."""
        return self._progress.request.priority

    def _begin_search(self) -> None:
        self._searching_since_s = self._clock.monotonic()
        self._pause_s = self._policy.retry_s

    def _place(self) -> bool:
        """Submit to a group; False when a suspect has to wait for its turn."""
        request = self._progress.next_attempt()
        if self._digests is None:
            self._digests = self._placer.digests(request)
        self._placement = self._placer.place(
            request,
            digests=self._digests,
            avoid=frozenset(self._full),
            is_suspect=self.is_suspect,
        )
        self._placer.on_moved(self, self._placement)
        return self._placement is not None

    async def _search(self) -> TokenOutput | None:
        """Place the request, waiting for a group while none can take it.

        Returns:
            None when it is placed, else its terminal output.

        Raises:
            CapacityError: a new request, and all groups are full; or none took it in time.
            EngineDeadError: no group came up in time.
        """
        while True:
            if self._is_abort_asked:
                return self._end(FinishReason.ABORT)
            if (error := self._progress.poison(self._policy)) is not None:
                return self._end(FinishReason.ERROR, error)
            try:
                if self._place():
                    return None
                # There are groups; nobody knows how long those before it take.
                self._begin_search()
                pause_s = self._policy.retry_s
            except (CapacityError, EngineDeadError) as exc:
                if self._must_give_up(exc):
                    self._finish()
                    raise
                pause_s = self._pause_after(exc)
            self._full.clear()
            await asyncio.sleep(pause_s)

    def _pause_after(self, error: CapacityError | EngineDeadError) -> float:
        """Short until a group comes back, longer and longer until a queue has room."""
        if isinstance(error, EngineDeadError):
            return self._policy.retry_s
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._policy.max_retry_s)
        return pause_s

    def _must_give_up(self, error: CapacityError | EngineDeadError) -> bool:
        if isinstance(error, CapacityError) and not self._was_accepted:
            return True
        waited_s = self._clock.monotonic() - self._searching_since_s
        return waited_s >= self._policy.deadline_s

    def _end(self, finish_reason: FinishReason, error: str | None = None) -> TokenOutput:
        self._finish()
        return self._progress.terminal(finish_reason, error)
