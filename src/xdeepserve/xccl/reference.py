"""The slow, obvious XCCL: every primitive in plain Python, one process, queues instead of memory.

The oracle of the tests: the same calls on `ReferencePort` and on `Port` give the same results.
There is nobody to wait for in one process, so a wait that is not met at once raises XcclTimeout,
or PeerLost when a rank that owes an answer is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from xdeepserve.errors import XcclError, XcclTimeout
from xdeepserve.xccl.layout import Layout, Tag
from xdeepserve.xccl.reference_rows import (
    Array,
    ReferenceBatch,
    ReferenceExchange,
    Slots,
    check_alive,
)


@dataclass
class _Stream:
    """Messages of one ordered pair: chunks under way, bounded by credits."""

    chunks: deque[tuple[int, int, int, bytes]] = field(default_factory=deque)
    unsent: deque[tuple[int, int, int, bytes]] = field(default_factory=deque)
    lent: bool = False


class ReferenceRun:
    """The ranks of a run: at most one life each."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.ports: dict[int, ReferencePort] = {}

    def join(self, rank: int) -> ReferencePort:
        """A new life of `rank`; its pairs with all others start afresh."""
        for port in self.ports.values():
            port.forget(rank)
        self.ports[rank] = ReferencePort(self, rank)
        return self.ports[rank]


class ReferencePort:
    """One life of a rank; the verbs of `Port`."""

    def __init__(self, run: ReferenceRun, rank: int) -> None:
        self.run = run
        self.rank = rank
        self.is_alive = True
        self.window = np.zeros(run.layout.window_bytes, np.uint8)
        self.streams: dict[int, _Stream] = {}  # to each rank
        self.slots: dict[int, Slots] = {}  # of requests, to each rank
        self.turn = 0  # of the rank that is served first

    def forget(self, rank: int) -> None:
        """The peer has a new life: what was under way to the old one is gone."""
        self.streams.pop(rank, None)
        self.slots.pop(rank, None)

    def close(self) -> None:
        """This life ends."""
        self.is_alive = False

    def peer(self, rank: int) -> ReferencePort:
        """The present life of a rank."""
        if rank not in self.run.ports:
            raise ValueError(f"rank {rank} is not attached")
        return self.run.ports[rank]

    # Messages

    def send(self, to: int, data: Array, tag: int = 0, timeout_s: float = 0.0) -> None:
        """As Port.send; out of credits it gives the message up."""
        stream = self._begin(to, data, tag)
        self.push(stream)
        if stream.unsent:
            stream.unsent.clear()
            check_alive(self.run.ports, [to])
            raise XcclTimeout(f"send to {to}", (to,))

    def _begin(self, to: int, data: Array, tag: int) -> _Stream:
        self.peer(to)
        stream = self.streams.setdefault(to, _Stream())
        if stream.unsent:
            raise XcclError(f"a message to {to} is not finished")
        raw = data.tobytes()
        size = self.run.layout.p2p_slot_bytes
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)] or [b""]
        stream.unsent.extend((tag, len(raw), i, piece) for i, piece in enumerate(pieces))
        return stream

    def push(self, stream: _Stream) -> None:
        """Moves chunks into the ring while credits last."""
        while stream.unsent and len(stream.chunks) < self.run.layout.p2p_slots:
            stream.chunks.append(stream.unsent.popleft())

    def isend(self, to: int, data: Array, tag: int = 0) -> ReferenceSend:
        """As Port.isend."""
        stream = self._begin(to, data, tag)
        self.push(stream)
        return ReferenceSend(self, stream)

    def recv(self, from_rank: int, out: Array, timeout_s: float = 0.0) -> tuple[int, int]:
        """As Port.recv; a message that is not all there is lost."""
        sender = self.peer(from_rank)
        stream = sender.streams.get(self.rank, _Stream())
        if stream.lent:
            raise XcclError("a chunk is lent")
        received = b""
        while True:
            if not stream.chunks:
                check_alive(self.run.ports, [from_rank])
                raise XcclTimeout(f"recv from {from_rank}", (from_rank,))
            tag, total, index, piece = stream.chunks[0]
            if index == 0:
                received = b""
                if total > out.nbytes:
                    raise ValueError(f"the message has {total} bytes, the buffer {out.nbytes}")
            elif not received:
                stream.chunks.popleft()
                continue
            stream.chunks.popleft()
            received += piece
            if len(received) == total:
                out.view(np.uint8).reshape(-1)[:total] = np.frombuffer(received, np.uint8)
                return total, tag

    def lend(self, from_rank: int, timeout_s: float = 0.0) -> tuple[bytes, int, int, int, int]:
        """As Port.lend."""
        sender = self.peer(from_rank)
        stream = sender.streams.get(self.rank, _Stream())
        if stream.lent:
            raise XcclError("a chunk is lent")
        if not stream.chunks:
            check_alive(self.run.ports, [from_rank])
            raise XcclTimeout(f"lend from {from_rank}", (from_rank,))
        stream.lent = True
        tag, total, index, piece = stream.chunks[0]
        num_chunks = max(1, -(-total // self.run.layout.p2p_slot_bytes))
        return piece, index, num_chunks, tag, total

    def give_back(self, from_rank: int) -> None:
        """As Port.give_back."""
        stream = self.peer(from_rank).streams.get(self.rank, _Stream())
        if not stream.lent:
            raise ValueError("nothing is lent")
        stream.lent = False
        stream.chunks.popleft()

    def flush(self, to: int, timeout_s: float = 0.0) -> None:
        """As Port.flush."""
        stream = self.streams.get(to, _Stream())
        if stream.chunks or stream.unsent:
            check_alive(self.run.ports, [to])
            raise XcclTimeout(f"flush to {to}", (to,))

    # Windows

    def _place(self, rank: int, offset: int, size: int, unit: int = 1) -> Array:
        if offset % unit or not 0 <= offset <= offset + size <= self.run.layout.window_bytes:
            raise ValueError(f"{size} bytes at {offset} are outside of the window")
        return self.peer(rank).window[offset : offset + size]

    def put(self, rank: int, offset: int, data: Array) -> None:
        """As Port.put."""
        self._place(rank, offset, data.nbytes)[:] = data.view(np.uint8).reshape(-1)

    def get(self, rank: int, offset: int, out: Array) -> None:
        """As Port.get."""
        out.view(np.uint8).reshape(-1)[:] = self._place(rank, offset, out.nbytes)

    def signal(self, rank: int, offset: int, value: int) -> None:
        """As Port.signal."""
        self._place(rank, offset, 8, 8).view(np.uint64)[0] = value

    def add(self, rank: int, offset: int, value: int) -> None:
        """As Port.add."""
        word = self._place(rank, offset, 8, 8).view(np.uint64)
        word[0] = (int(word[0]) + value) % 2**64

    def wait_signal(
        self, offset: int, at_least: int, timeout_s: float = 0.0, owed: Sequence[int] = ()
    ) -> int:
        """As Port.wait_signal."""
        value = int(self._place(self.rank, offset, 8, 8).view(np.uint64)[0])
        if value < at_least:
            check_alive(self.run.ports, owed)
            raise XcclTimeout("wait for a signal", tuple(owed))
        return value

    # Exchanges

    def exchange(
        self, rows: Array, *, scales: Array | None = None, quantize: bool = False
    ) -> ReferenceExchange:
        """As Port.exchange."""
        return ReferenceExchange(self, rows, scales, quantize)

    def slots_to(self, rank: int) -> Slots:
        """The request slots of this rank to another."""
        return self.slots.setdefault(rank, Slots(self.run.layout.row_slots))

    def a2e(
        self,
        *,
        tag: Tag,
        hidden_states: Array,
        topk_ids: Array,
        expert_rank: Array,
        kind: int = 0,
        quantize: bool = False,
        timeout_s: float = 0.0,
    ) -> ReferenceExchange:
        """As Port.a2e."""
        exchange = self.exchange(hidden_states, quantize=quantize)
        exchange.add_routed(
            topk_ids.reshape(-1), topk_ids.shape[1], None, expert_rank, tag, kind, []
        )
        exchange.post(timeout_s)
        return exchange

    def poll(self, timeout_s: float = 0.0, max_requests: int = 64) -> list[ReferenceBatch]:
        """As Port.poll: ranks take turns, each oldest first."""
        arrived: list[ReferenceBatch] = []
        while len(arrived) < max_requests:
            batch = self._take()
            if batch is None:
                break
            arrived.append(batch)
        return arrived

    def _take(self) -> ReferenceBatch | None:
        """The next request that is still wanted; those given up are answered on the way."""
        for i in range(self.run.layout.max_ranks):
            rank = (self.turn + i) % self.run.layout.max_ranks
            asker = self.run.ports.get(rank)
            for request in asker.slots_to(self.rank).published if asker else []:
                if request.is_taken:
                    continue
                request.is_taken = True
                if request.is_cancelled:
                    request.is_answered = True
                    continue
                self.turn = rank + 1
                return ReferenceBatch(rank, request)
        return None


class ReferenceSend:
    """As SendHandle."""

    def __init__(self, port: ReferencePort, stream: _Stream) -> None:
        self._port = port
        self._stream = stream

    def test(self) -> bool:
        """True when all of it is in the ring."""
        self._port.push(self._stream)
        return not self._stream.unsent
