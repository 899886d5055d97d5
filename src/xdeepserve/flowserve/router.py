"""RouterEngine: several DP groups behind one EngineClient.

A request goes to the group whose KV pool will be least in demand with it: blocks held, plus blocks
reserved for accepted requests that hold none yet, plus what the request needs beyond the prefix the
group has seen. Choosing waits for nobody. Groups come and go at run time; requests of a group
that is lost or drained go on elsewhere (see RoutedStream).
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.engine_api import EngineClient
from xdeepserve.errors import CapacityError, ConfigError, EngineDeadError, RequestError
from xdeepserve.flowserve.load import NO_LOAD, counters_of, total_load
from xdeepserve.flowserve.prefix_memory import prefix_digests
from xdeepserve.flowserve.replay import Loss, ReplayPolicy
from xdeepserve.flowserve.routed_group import RoutedGroup
from xdeepserve.flowserve.routed_stream import Placement, RoutedStream
from xdeepserve.flowserve.validation import validate_request
from xdeepserve.messages import EngineInfo, GenerateRequest, LoadReport, num_blocks_needed

logger = logging.getLogger(__name__)

MAX_HOMELESS: Final = 1024
"""Requests that may wait for a first group while none is there (a restart, say)."""

MOVE_TIMEOUT_S: Final = 5.0
"""How long `drain` waits for the requests it has told to move."""

_POLL_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """One group as the router sees it.

    Attributes:
        num_requests: requests that run or wait there.
        num_failures: times a request was lost with it.
    """

    name: str
    is_alive: bool
    is_draining: bool
    num_requests: int
    num_failures: int
    load: LoadReport


class RouterEngine:
    """EngineClient over any number of engines of one model. All methods run on one event loop."""

    def __init__(
        self,
        info: EngineInfo,
        *,
        policy: ReplayPolicy = ReplayPolicy(),  # noqa: B008
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """Make a router without groups.

        Args:
            info: of any group; what all must agree on.
            policy: how often and how long lost requests are replayed.
            clock: for deadlines.
        """
        self._info = info
        self._policy = policy
        self._clock = clock
        self._members: dict[str, RoutedGroup] = {}
        self._streams: weakref.WeakValueDictionary[str, RoutedStream] = (
            weakref.WeakValueDictionary()
        )
        self._past_load = NO_LOAD
        self._closed_since_s: float | None = None
        self._is_closing = False

    # -- members --------------------------------------------------------------------------------

    def add(self, name: str, engine: EngineClient) -> None:
        """Route to one more group from now on; the router closes it.

        Raises:
            ConfigError: the name is taken, or the group serves something else.
        """
        if name in self._members:
            raise ConfigError(f"a DP group named {name} is there already; remove it first")
        if _identity(engine.info) != _identity(self._info):
            raise ConfigError(f"{name} serves {engine.info}, the others serve {self._info}")
        self._members[name] = RoutedGroup(name, engine)

    async def drain(self, name: str, *, timeout_s: float) -> None:
        """Route nothing more to a group; wait for its requests, then move the rest elsewhere.

        Raises:
            ConfigError: no group has this name.
        """
        member = self._member(name)
        member.is_draining = True
        if await self._wait_until_empty(member, timeout_s):
            return
        streams = member.streams
        logger.info("moving %d requests away from %s", len(streams), name)
        for stream in streams:
            await stream.give_up_place()
        await self._wait_until_empty(member, MOVE_TIMEOUT_S)

    async def remove(self, name: str, *, drain_timeout_s: float) -> None:
        """Drain a group, forget it and close its client."""
        await self.drain(name, timeout_s=drain_timeout_s)
        member = self._members.pop(name, None)
        if member is not None:
            self._past_load = total_load((self._past_load, counters_of(member.engine.load())))
            await member.engine.close(drain_timeout_s=0.0)

    def members(self) -> list[MemberStatus]:
        """All groups, in order of name."""
        return [
            MemberStatus(
                name=name,
                is_alive=member.engine.is_alive(),
                is_draining=member.is_draining,
                num_requests=member.num_streams,
                num_failures=member.num_failures,
                load=member.engine.load(),
            )
            for name, member in sorted(self._members.items())
        ]

    def _member(self, name: str) -> RoutedGroup:
        member = self._members.get(name)
        if member is None:
            known = ", ".join(sorted(self._members)) or "none"
            raise ConfigError(f"no DP group is named {name}; there are: {known}")
        return member

    async def _wait_until_empty(self, member: RoutedGroup, timeout_s: float) -> bool:
        deadline_s = self._clock.monotonic() + timeout_s
        while member.num_streams:
            if self._clock.monotonic() >= deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    # -- EngineClient ---------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """What all groups agree on; sizes are those of one group."""
        return self._info

    def generate(self, *, request: GenerateRequest) -> RoutedStream:
        """Submit a request to the best group; see EngineClient.generate.

        While no group is there the request waits for one, until the policy's deadline.
        """
        validate_request(request, self._info)
        if self._is_closing:
            raise CapacityError("the server is shutting down; send the request elsewhere")
        if request.request_id in self._streams:
            raise RequestError(f"request_id={request.request_id!r} is already in use")
        stream = RoutedStream(request, placer=self, policy=self._policy, clock=self._clock)
        try:
            stream.try_place()
        except EngineDeadError:
            if self._num_homeless() >= MAX_HOMELESS:
                raise
        self._streams[request.request_id] = stream
        return stream

    async def abort(self, *, request_id: str) -> None:
        """Ask for a request's end; see EngineClient.abort."""
        if (stream := self._streams.get(request_id)) is not None:
            await stream.ask_abort()

    def load(self) -> LoadReport:
        """The sum over all groups; requests without a group count as waiting. Never blocks."""
        members = total_load([self._past_load, *(m.engine.load() for m in self._members.values())])
        num_waiting = members.num_waiting + self._num_homeless()
        return msgspec.structs.replace(members, num_waiting=num_waiting)

    def is_alive(self) -> bool:
        """Whether requests can be taken: a group is there, or one was a short while ago.

        So a restart is a pause and not an error.
        """
        if self._is_closing:
            return False
        if any(member.is_open for member in self._members.values()):
            self._closed_since_s = None
            return True
        now_s = self._clock.monotonic()
        if self._closed_since_s is None:
            self._closed_since_s = now_s
        return now_s - self._closed_since_s < self._policy.deadline_s

    async def close(self, *, drain_timeout_s: float) -> None:
        """Refuse new requests, drain all groups at once, close their clients. Idempotent."""
        self._is_closing = True
        members = list(self._members.values())
        await asyncio.gather(*(self._wait_until_empty(m, drain_timeout_s) for m in members))
        await asyncio.gather(*(s.ask_abort() for s in list(self._streams.values())))
        await asyncio.gather(*(m.engine.close(drain_timeout_s=0.0) for m in members))

    # -- Placer ---------------------------------------------------------------------------------

    def digests(self, request: GenerateRequest) -> Sequence[bytes]:
        """See Placer.digests."""
        return prefix_digests(request, self._info.block_size)

    def place(
        self,
        request: GenerateRequest,
        *,
        digests: Sequence[bytes],
        avoid: frozenset[str],
        is_suspect: bool,
    ) -> Placement | None:
        """See Placer.place. Ties go to the group with fewer requests, then by name."""
        open_members = [member for member in self._members.values() if member.is_open]
        candidates = [member for member in open_members if member.name not in avoid]
        is_full = len(candidates) < len(open_members)
        if is_suspect and candidates:
            candidates = [member for member in candidates if not member.has_suspect]
            if not candidates:
                return None
        for member in self._ranked(candidates, request, digests):
            try:
                outputs = member.engine.generate(request=request)
            except CapacityError:
                is_full = True
            except EngineDeadError:
                continue
            else:
                member.prefixes.remember(digests)
                return Placement(member.name, member.engine, request.request_id, outputs)
        if is_full:
            raise CapacityError("the queues of all DP groups are full; retry later")
        raise EngineDeadError("no DP group is running")

    def _ranked(
        self, members: Sequence[RoutedGroup], request: GenerateRequest, digests: Sequence[bytes]
    ) -> list[RoutedGroup]:
        """Members, best first."""
        num_needed = num_blocks_needed(request, self._info.block_size)

        def cost(member: RoutedGroup) -> tuple[float, int, str]:
            load = member.engine.load()
            num_new = num_needed - member.prefixes.num_known(digests)
            demand = load.kv_demand + num_new / max(1, load.num_total_blocks)
            return demand, load.num_running + load.num_waiting, member.name

        return sorted(members, key=cost)

    def on_moved(self, stream: RoutedStream, placement: Placement | None) -> None:
        """See Placer.on_moved."""
        for member in self._members.values():
            member.leave(stream)
        if placement is not None:
            self._members[placement.member_name].enter(stream)

    def on_over(self, stream: RoutedStream) -> None:
        """See Placer.on_over."""
        self.on_moved(stream, None)
        self._streams.pop(stream.request_id, None)

    def note_loss(self, stream: RoutedStream, member_name: str) -> Loss:
        """See Placer.note_loss."""
        member = self._members.get(member_name)
        return Loss.MEANT if member is None else member.note_loss(stream)

    def _num_homeless(self) -> int:
        return sum(stream.is_homeless for stream in self._streams.values())


def _identity(info: EngineInfo) -> EngineInfo:
    """What groups must agree on, so that a request gets the same tokens from any of them."""
    return msgspec.structs.replace(info, num_kv_blocks=0, max_num_seqs=0)
