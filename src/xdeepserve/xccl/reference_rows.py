"""Row exchanges of the reference: who gets which rows, slots, answers, losses; lists and dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from xdeepserve.errors import PeerLost, XcclError, XcclTimeout
from xdeepserve.xccl.exchange import Part, PartState, Reply, make_part
from xdeepserve.xccl.layout import Layout, Tag

Array = npt.NDArray[Any]
_OWING = (PartState.PLANNED, PartState.WAITING)


class Life(Protocol):
    """What an exchange needs of a port."""

    rank: int
    is_alive: bool

    @property
    def run(self) -> Run:
        """Its run."""
        ...

    def slots_to(self, rank: int) -> Slots:
        """Request slots to a rank."""
        ...


class Run(Protocol):
    """What an exchange needs of a run."""

    layout: Layout

    @property
    def ports(self) -> Mapping[int, Life]:
        """The present life of each rank."""
        ...


def check_alive(ports: Mapping[int, Life], ranks: Iterable[int]) -> None:
    """PeerLost when one of `ranks` is gone."""
    lost = tuple(rank for rank in ranks if rank not in ports or not ports[rank].is_alive)
    if lost:
        raise PeerLost(f"ranks {lost} are gone", lost)


@dataclass
class Request:
    """One request and, later, its answer."""

    tag: Tag
    kind: int
    rows: Array
    scales: Array | None
    meta: Array
    reply_rows: int
    is_taken: bool = False
    is_cancelled: bool = False
    is_answered: bool = False
    is_free: bool = False  # its slot may be used again
    answer: tuple[Array, Array | None] | None = None
    detail: int = 0


@dataclass
class Slots:
    """Requests of one ordered pair: the n-th needs the slot of the (n - size)-th."""

    size: int
    published: list[Request] = field(default_factory=list)

    def has_room(self) -> bool:
        if len(self.published) < self.size:
            return True
        last = self.published[-self.size]
        return last.is_free or (last.is_cancelled and last.is_answered)


class ReferenceBatch:
    """As Batch."""

    def __init__(self, source_rank: int, request: Request) -> None:
        self.source_rank = source_rank
        self.tag = request.tag
        self.kind = request.kind
        self.rows = request.rows
        self.scales = request.scales
        self.meta = request.meta
        self.reply_rows = request.reply_rows
        self._request = request

    @property
    def pairs(self) -> Array:
        """As Batch.pairs."""
        return self.meta.reshape(-1, 2)

    def reply(self, rows: Array, *, scales: Array | None = None, quantize: bool = False) -> bool:
        """As Batch.reply."""
        self._answer()
        self._request.answer = quantize_rows(rows) if quantize else (rows.copy(), scales)
        return True

    def refuse(self, detail: int = 0) -> bool:
        """As Batch.refuse."""
        self._answer()
        self._request.detail = detail
        return True

    def _answer(self) -> None:
        if self._request.is_answered:
            raise ValueError("answered already")
        self._request.is_answered = True


@dataclass
class _Part:
    rank: int
    tag: Tag
    kind: int
    row_idx: list[int]
    meta: list[int]
    slots: list[int]
    reply_rows: int
    state: PartState = PartState.PLANNED
    life: Life | None = None
    request: Request | None = None


class ReferenceExchange:
    """As Exchange."""

    def __init__(self, port: Life, rows: Array, scales: Array | None, quantize: bool) -> None:
        self._port = port
        self._rows, self._scales = quantize_rows(rows) if quantize else (rows, scales)
        self._parts: list[_Part] = []
        self._experts: Array = np.empty(0, np.int32)
        self._pair_rows: Array = np.empty(0, np.int32)

    def add(
        self,
        rank: int,
        *,
        tag: Tag,
        kind: int = 0,
        row_idx: Array | None = None,
        meta: Array | None = None,
        reply_rows: int = 0,
    ) -> None:
        """As Exchange.add."""
        rows = list(range(len(self._rows))) if row_idx is None else [int(i) for i in row_idx]
        words = [] if meta is None else [int(i) for i in meta]
        self._parts.append(_Part(rank, tag, kind, rows, words, [], reply_rows))

    def add_routed(
        self,
        experts: Array,
        top_k: int,
        pair_rows: Array | None,
        expert_rank: Array,
        tag: Tag,
        kind: int,
        also: Sequence[int],
    ) -> None:
        """As Exchange.add_routed."""
        self._experts = experts
        self._pair_rows = np.arange(len(experts)) // top_k if pair_rows is None else pair_rows
        slots = [slot for slot, expert in enumerate(experts) if expert != -1]
        self._plan(slots, expert_rank, tag, kind, also)

    def _plan(
        self, slots: list[int], expert_rank: Array, tag: Tag, kind: int, also: Sequence[int]
    ) -> None:
        owner = {}
        for slot in slots:
            expert = self._experts[slot]
            if not 0 <= expert < len(expert_rank) or expert_rank[expert] < 0:
                raise ValueError(f"expert {expert} lives nowhere")
            owner[slot] = int(expert_rank[expert])
        for rank in sorted({*owner.values(), *also}):
            mine = sorted(
                (slot for slot in slots if owner[slot] == rank),
                key=lambda slot: (self._experts[slot], slot),
            )
            rows = list(dict.fromkeys(int(self._pair_rows[slot]) for slot in mine))
            meta = []
            for slot in mine:
                meta += [rows.index(int(self._pair_rows[slot])), int(self._experts[slot])]
            self._parts.append(_Part(rank, tag, kind, rows, meta, mine, len(mine)))

    def reroute(self, ranks: Sequence[int], expert_rank: Array, tag: Tag) -> bool:
        """As Exchange.reroute."""
        moved = [part for part in self._open_parts(ranks) if part.slots]
        slots = sorted(slot for part in moved for slot in part.slots)
        kind = moved[-1].kind if moved else 0
        self._plan(slots, expert_rank, tag, kind, [])
        for part in moved:
            self._give_up(part, PartState.MOVED)
        return bool(moved)

    def resend(self, from_rank: int, to: int, tag: Tag) -> bool:
        """As Exchange.resend."""
        moved = [p for p in self._open_parts([from_rank]) if not p.slots and p.tag != tag]
        for old in moved:
            self._give_up(old, PartState.MOVED)
            self._parts.append(_Part(to, tag, old.kind, old.row_idx, old.meta, [], old.reply_rows))
        return bool(moved)

    def _open_parts(self, ranks: Sequence[int]) -> list[_Part]:
        closed = (PartState.ANSWERED, PartState.MOVED)
        return [p for p in self._parts if p.rank in ranks and p.state not in closed]

    def _give_up(self, part: _Part, state: PartState) -> None:
        if part.request is not None and part.state is PartState.WAITING:
            part.request.is_cancelled = True
        part.state = state

    def post(self, timeout_s: float = 0.0) -> None:
        """As Exchange.post."""
        blocked = self._post()
        if blocked:
            self._check_lost()
            raise XcclTimeout(f"no slot to {blocked}", self._ranks(*_OWING))

    def _post(self) -> list[int]:
        blocked = []
        for part in [p for p in self._parts if p.state is PartState.PLANNED]:
            life = self._port.run.ports.get(part.rank)
            if life is None or not life.is_alive:
                part.state = PartState.LOST
                continue
            slots = self._port.slots_to(part.rank)
            if not slots.has_room():
                blocked.append(part.rank)
                continue
            rows = np.ascontiguousarray(self._rows[part.row_idx])
            scales = None if self._scales is None else self._scales[part.row_idx]
            meta = np.array(part.meta, np.int32)
            part.request = Request(part.tag, part.kind, rows, scales, meta, part.reply_rows)
            part.life, part.state = life, PartState.WAITING
            slots.published.append(part.request)
        return blocked

    def is_done(self) -> bool:
        """As Exchange.is_done."""
        if self._advance():
            return True
        for part in self._parts:
            if part.state in _OWING and not self._port.run.ports[part.rank].is_alive:
                self._give_up(part, PartState.LOST)
        self._check_lost()
        return False

    def _check_lost(self) -> None:
        if lost := self._ranks(PartState.LOST):
            raise PeerLost(f"ranks {lost} are gone", lost)

    def _advance(self) -> bool:
        self._post()
        for part in self._parts:
            if part.state in (PartState.WAITING, PartState.ANSWERED):
                self._collect(part)
        done = (PartState.ANSWERED, PartState.REFUSED, PartState.MOVED)
        return all(part.state in done for part in self._parts)

    def _collect(self, part: _Part) -> None:
        assert part.request is not None
        if self._port.run.ports[part.rank] is not part.life:
            part.state = PartState.LOST
        elif part.state is PartState.WAITING and part.request.is_answered:
            part.state = PartState.ANSWERED if part.request.answer else PartState.REFUSED
            part.request.is_free = part.state is PartState.REFUSED

    def wait(self, timeout_s: float = 0.0) -> None:
        """As Exchange.wait."""
        if not self.is_done():
            ranks = self._ranks(*_OWING)
            raise XcclTimeout(f"ranks {ranks} have not answered", ranks)

    def _ranks(self, *states: PartState) -> tuple[int, ...]:
        return tuple(dict.fromkeys(p.rank for p in self._parts if p.state in states))

    @property
    def parts(self) -> list[Part]:
        """As Exchange.parts."""
        return [
            make_part(p.rank, p.state, p.request.detail if p.request else 0) for p in self._parts
        ]

    def replies(self) -> list[Reply]:
        """As Exchange.replies."""
        found = []
        for part in self._parts:
            if part.state is PartState.ANSWERED and part.request and part.request.answer:
                rows, scales = part.request.answer
                found.append(Reply(part.rank, np.array(part.slots, np.int32), rows, scales))
        return found

    def gather(self, out: Array) -> None:
        """As Exchange.gather."""
        allowed = (PartState.ANSWERED, PartState.MOVED)
        if any(part.state not in allowed for part in self._parts):
            raise XcclError("an answer is missing or refused")
        for reply in self.replies():
            values = reply.rows.astype(np.float32)
            if reply.scales is not None:
                values = reply.scales[:, None] * values
            for slot, row in zip(reply.slots, values, strict=bool(len(reply.slots))):
                out[slot] = row

    def e2a(self, topk_weights: Array, *, hidden_size: int, timeout_s: float = 0.0) -> Array:
        """As Exchange.e2a, for float32 and int8 answers."""
        self.wait(timeout_s)
        rows = np.zeros((topk_weights.size, hidden_size), np.float32)
        self.gather(rows)
        out = np.zeros((topk_weights.shape[0], hidden_size), np.float32)
        for t, k in np.ndindex(*topk_weights.shape):
            slot = t * topk_weights.shape[1] + k
            if self._experts[slot] != -1:
                out[t] += topk_weights[t, k] * rows[slot]
        return out

    def release(self) -> None:
        """As Exchange.release."""
        for part in self._parts:
            if part.request is not None and part.state is PartState.ANSWERED:
                part.request.is_free = True
            if part.request is not None and part.state is PartState.WAITING:
                part.request.is_cancelled = True
        self._parts = []


def quantize_rows(rows: Array) -> tuple[Array, Array]:
    """Symmetric int8 per row: scale = max|x| / 127, half to even, within [-127, 127].

    A row below 2**-100 throughout becomes zeros with scale 0.
    """
    largest = np.abs(rows).max(axis=1, initial=np.float32(0))
    is_zero = largest < np.float32(2.0**-100)
    limit = np.float32(127)
    inverse = np.where(is_zero, np.float32(0), limit / np.where(is_zero, limit, largest))
    scales = np.where(is_zero, np.float32(0), largest / limit).astype(np.float32)
    rounded = np.rint(rows * inverse[:, None].astype(np.float32))
    return np.clip(rounded, -127, 127).astype(np.int8), scales
