"""A rank's port: its segment, its peers, and every primitive. What an engine holds of XCCL.

port = Port(run_id, "expert0", rank, layout=layout)     create
blob = port.blob()                                      exchange, by any channel
port.attach(peer_blob)                                  verify, map, reset the pair
... send/recv, put/get/signal, a2e/poll ...             thread: one at a time
port.close()                                            unlink, tell the peers
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType

from xdeepserve import _xccl
from xdeepserve.errors import IntegrityError, SegmentError, XcclTimeout
from xdeepserve.xccl.batch import F32, I32, Array
from xdeepserve.xccl.exchange import Exchange
from xdeepserve.xccl.layout import Layout, Tag
from xdeepserve.xccl.segments import SHM_FOLDER, list_segments

FORWARD: int = _xccl.FORWARD
"""`kind` of a request whose receiver spreads the rows over the ranks that own their experts."""

_LINK_POLL_S = 0.001
_CLOCK_TICK_NS = 20_000_000
"""Longer than the resolution of a folder's time stamp."""


class PeerState(IntEnum):
    """ABSENT: never attached. DEAD stays until a new life is attached; FROZEN may thaw."""

    ABSENT = 0
    ALIVE = 1
    FROZEN = 2
    DEAD = 3


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """What this rank knows of a peer's life.

    Attributes:
        state: see PeerState.
        pid, incarnation: of the attached life; 0 when absent.
        silence_s: observed time without a heartbeat. Only waits and looks observe.
    """

    state: PeerState
    pid: int
    incarnation: int
    silence_s: float


class TraceKind(IntEnum):
    """Which transfer a record is of."""

    SEND = 0
    RECV = 1
    REQUEST = 2
    SERVE = 3
    PUT = 4
    GET = 5
    SIGNAL = 6
    ADD = 7


@dataclass(frozen=True, slots=True)
class TraceRecord:
    """One transfer; times are CLOCK_MONOTONIC nanoseconds, comparable between processes.

    Attributes:
        kind: SEND, RECV, REQUEST (asker), SERVE (server), or a verb on a peer's window.
        peer: the other rank.
        tag: of send/recv; the step_idx of a request; the offset in a window.
        layer_idx, microbatch_idx: of a request; else 0.
        num_bytes: of the message or request.
        enqueue_ns: the call began; SERVE: the asker published (0 unless it traces).
        visible_ns: published to the other side; RECV, SERVE: seen here; windows: as done_ns.
        done_ns: the call ended; REQUEST: the answer was read; SERVE: it was published.
    """

    kind: TraceKind
    peer: int
    tag: int
    layer_idx: int
    microbatch_idx: int
    num_bytes: int
    enqueue_ns: int
    visible_ns: int
    done_ns: int


class Port(_xccl.Port):
    """One rank of a run. Every wait has a deadline; no call blocks another thread's Python."""

    def __init__(
        self,
        run_id: str,
        name: str,
        rank: int,
        *,
        layout: Layout | None = None,
        frozen_after_s: float = 2.0,
    ) -> None:
        """Makes the segment `/dev/shm/xds-<run_id>-<name>`.

        Args:
            run_id: of the run: letters, digits, '_', '.'.
            name: of this rank; a new life of it takes the name over.
            rank: 0 to layout.max_ranks - 1.
            layout: equal on all ranks.
            frozen_after_s: a peer that owes an answer and shows no heartbeat for so long is
                frozen; longer than the longest time that a worker computes without a call.

        Raises:
            SegmentError: a parameter is out of range, or /dev/shm has no room.
        """
        self.layout = layout or Layout()
        self.run_id = run_id
        self.name = name
        super().__init__(run_id, name, rank, self.layout.to_native(), frozen_after_s)
        self._own = self.own_bytes()
        self._discovered_ns = 0

    # Life

    def discover(self) -> list[int]:
        """Attaches every running rank of the run found in /dev/shm; returns their ranks."""
        found = [i for i in list_segments(self.run_id) if i.is_running and i.rank >= 0]
        for info in found:
            if self.peer_status(info.rank)[2] >= info.incarnation:
                continue
            try:
                self.attach(_xccl.read_blob(self.run_id, info.name))
            except SegmentError:
                if info in list_segments(self.run_id):  # else it went away or has a new life
                    raise
        return [info.rank for info in found]

    def discover_news(self) -> None:
        """As `discover`, but only when segments came or went since; cheap, to be called often.

        Raises:
            SegmentError: as `attach`.
        """
        changed_ns = os.stat(SHM_FOLDER).st_mtime_ns
        if changed_ns == self._discovered_ns:
            return
        self.discover()
        # Another change within this tick would have the same time stamp: then look again.
        is_settled = time.time_ns() - changed_ns > _CLOCK_TICK_NS
        self._discovered_ns = changed_ns if is_settled else 0

    def wait_linked(self, ranks: Sequence[int], timeout_s: float = 30.0) -> None:
        """Discovers until all `ranks` are attached and have attached this rank.

        Raises:
            XcclTimeout: `ranks` of it lists those that are missing.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.discover()
            missing = tuple(rank for rank in ranks if not self.is_linked(rank))
            if not missing:
                return
            if time.monotonic() >= deadline:
                raise XcclTimeout(f"ranks {missing} did not join within {timeout_s} s", missing)
            time.sleep(_LINK_POLL_S)

    def status_of(self, rank: int) -> PeerStatus:
        """Looks at a peer's process and heartbeat now."""
        state, pid, incarnation, silence_s = self.peer_status(rank)
        return PeerStatus(PeerState(state), pid, incarnation, silence_s)

    def close(self) -> None:
        """Removes the segment's name and tells the peers that this life is over. Idempotent."""
        self.unlink()
        self.close_segment()

    def __enter__(self) -> Port:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Messages and memory

    def isend(self, to: int, data: object, tag: int = 0) -> _xccl.SendHandle:
        """Starts a message and returns; `test()` or `wait()` drive and finish it.

        `data` is held until it is in the ring. Other waits of this port drive it too.

        Raises:
            XcclError: an earlier message to this rank is not finished.
        """
        return _xccl.SendHandle(self, to, data, tag)

    def irecv(self, from_rank: int, out: object) -> _xccl.RecvHandle:
        """Expects a message into `out` and returns; `test()` or `wait()` take it.

        One at a time from a rank: messages have an order. A handle that is dropped before its
        message has begun to arrive takes nothing.
        """
        return _xccl.RecvHandle(self, from_rank, out)

    @property
    def window(self) -> Array:
        """[window_bytes] uint8: this rank's window; peers write it with put, signal and add."""
        return self._own[self.window_offset : self.window_offset + self.layout.window_bytes]

    # Exchanges of rows

    def exchange(
        self, rows: Array, *, scales: F32 | None = None, quantize: bool = False
    ) -> Exchange:
        """An empty exchange over `rows`; `add` parts, then `post` or `wait`.

        Args:
            rows: [T, width] float32, uint16 (bfloat16 bits), int8 or uint8, C-contiguous; stays
                unchanged until the exchange is released.
            scales: [T] float32, with int8 rows.
            quantize: float32 or bfloat16 rows travel as int8 with one scale each.
        """
        return Exchange(self, rows, scales, quantize)

    def a2e(
        self,
        *,
        tag: Tag,
        hidden_states: Array,
        topk_ids: I32,
        expert_rank: I32,
        kind: int = 0,
        quantize: bool = False,
        timeout_s: float = 30.0,
    ) -> Exchange:
        """Sends each row once to every rank that owns one of its experts; returns at once.

        The server sees the rows and their (row, expert) pairs sorted by expert, and answers with
        one row per pair. Waits only while no slot to a rank is free.

        Args:
            tag: names the exchange.
            hidden_states: [T, H] float32, or uint16 bfloat16 bits; unchanged until released.
            topk_ids: [T, K] int32, C-contiguous; -1 = nobody; unchanged until released.
            expert_rank: [P] int32: the rank that owns each expert; a trampoline's rank for all,
                with kind=FORWARD.
            kind: passed on to the servers.
            quantize: rows travel as int8 with one scale each.
            timeout_s: for free slots.

        Raises:
            ValueError: a request exceeds request_bytes, or an expert lives nowhere.
            PeerLost, XcclTimeout: while waiting for a slot.
        """
        exchange = Exchange(self, hidden_states, None, quantize)
        exchange.post_routed(topk_ids, expert_rank, tag, kind, timeout_s)
        return exchange

    # Records

    def trace_records(self) -> list[TraceRecord]:
        """Takes the records since the last call, oldest first; `open_trace(capacity)` starts."""
        return [TraceRecord(TraceKind(kind), *rest) for kind, *rest in self.take_trace()]

    def check_integrity(self) -> None:
        """Raises when slots or requests are open; for idle ports, and tests."""
        open_slots = [self.num_open_slots(rank) for rank in range(self.layout.max_ranks)]
        if any(open_slots) or self.num_open_requests:
            raise IntegrityError(
                f"not idle: slots open per rank {open_slots}, "
                f"{self.num_open_requests} requests unanswered"
            )
