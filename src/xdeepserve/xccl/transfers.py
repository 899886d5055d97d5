"""The latest transfers of a running service, read from its segments by somebody who takes no part.

Every message and request leaves its header in the sender's segment until its slot is used again, so
the last `row_slots` requests and `p2p_slots` chunks of each ordered pair can always be looked at.
Nothing is mapped, attached or written: the headers are read from the files in /dev/shm. Byte
offsets are those of `native/xccl/layout.h` and `messages.h`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from xdeepserve import _xccl
from xdeepserve.errors import SegmentError
from xdeepserve.xccl.batch import INT8_ROWS
from xdeepserve.xccl.segments import SegmentInfo, list_segments

_PAGE = 4096
_TAG = {
    "step_idx": ("u8", 8),
    "epoch": ("u4", 16),
    "layer_idx": ("u2", 20),
    "microbatch_idx": ("u2", 22),
}


def _record(size: int, fields: dict[str, tuple[str, int]]) -> np.dtype[Any]:
    formats, offsets = zip(*fields.values(), strict=True)
    return np.dtype(
        {"names": list(fields), "formats": formats, "offsets": offsets, "itemsize": size}
    )


_HEADER = _record(
    256,
    {
        "total_bytes": ("u8", 16),
        "incarnation": ("u8", 40),
        "max_ranks": ("u4", 48),
        "p2p_slots": ("u4", 52),
        "row_slots": ("u4", 60),
        "window_bytes": ("u8", 80),
    },
)
_LINK = _record(64, {"peer_incarnation": ("u8", 0), "p2p_received": ("u8", 8)})
_CHUNK = _record(64, {"event": ("u8", 0), "num_bytes": ("u4", 16), "tag": ("u4", 20)})
_REQUEST = _record(
    128,
    {
        "seq": ("u8", 0),
        **_TAG,
        "row_type": ("u2", 38),
        "num_rows": ("u4", 40),
        "row_bytes": ("u4", 44),
        "num_meta": ("u4", 48),
        "sent_ns": ("i8", 56),
        "cancel": ("u8", 64),
    },
)
_REPLY = _record(
    64,
    {
        "seq": ("u8", 0),
        **_TAG,
        "code": ("u2", 40),
        "row_type": ("u2", 42),
        "num_rows": ("u4", 44),
        "row_bytes": ("u4", 48),
        "sent_ns": ("i8", 56),
    },
)
_CODES = ("answered", "refused", "given up")

Records = npt.NDArray[Any]


class TransferKind(StrEnum):
    """CHUNK: of a point-to-point message. REQUEST: of rows, with its answer."""

    CHUNK = "chunk"
    REQUEST = "request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """One transfer as its headers show it; times are CLOCK_MONOTONIC nanoseconds.

    Attributes:
        rank, peer: who sent it to whom.
        state: "waiting", then "taken" (chunk) or "answered", "refused", "given up" (request).
        num_bytes: of the payload; of a request: metadata, scales and rows.
        reply_bytes: of the answer; 0 without one.
        sequence: counts the chunks or requests of this ordered pair, from 1.
        tag: of a chunk.
        epoch, step_idx, layer_idx, microbatch_idx: of a request.
        start_ns: it was published; None unless its sender traces (`Port.open_trace`).
        duration_ns: until the answer was published; None unless both sides trace.
    """

    rank: int
    peer: int
    kind: TransferKind
    state: str
    num_bytes: int
    reply_bytes: int = 0
    sequence: int
    tag: int | None = None
    epoch: int | None = None
    step_idx: int | None = None
    layer_idx: int | None = None
    microbatch_idx: int | None = None
    start_ns: int | None = None
    duration_ns: int | None = None


def read_transfers(run_id: str) -> list[Transfer]:
    """The latest transfers of all ranks of a run: by start, those without a time first.

    Segments of dead ranks count while they have a name. A header that is being written while it is
    read is left out. Source: ours.

    Raises:
        SegmentError: no segment of this run exists, or one has another layout.
    """
    with ExitStack() as files:
        heads = {}
        for info in list_segments(run_id):
            if info.rank < 0:
                continue
            try:
                heads[info.rank] = files.enter_context(_open(info))
            except (SegmentError, FileNotFoundError):
                if info.path.exists():  # else it went away between listing and opening
                    raise
        if not heads:
            raise SegmentError(f"no rank of run {run_id!r} has a segment in /dev/shm")
        found = [t for rank in heads for t in (*_requests(heads, rank), *_chunks(heads, rank))]
    return sorted(found, key=lambda t: (t.start_ns or 0, t.rank, t.peer, t.kind, t.sequence))


class _Heads:
    """The headers in one segment, read afresh by every call."""

    def __init__(self, file: int, header: Any) -> None:
        self._file = file
        self.incarnation = int(header["incarnation"])
        self.num_ranks = int(header["max_ranks"])
        self.p2p_slots, self.row_slots = int(header["p2p_slots"]), int(header["row_slots"])
        chunks, rows = self.num_ranks * self.p2p_slots, self.num_ranks * self.row_slots
        self._links = _PAGE + 128
        self._chunks = (
            _pages(self._links + self.num_ranks * _LINK.itemsize)
            + _PAGE
            + _pages(int(header["window_bytes"]))
        )
        self._requests = _pages(self._chunks + chunks * _CHUNK.itemsize)
        self._replies = _pages(self._requests + rows * _REQUEST.itemsize)

    def _read(self, dtype: np.dtype[Any], offset: int, slots: int) -> Records:
        size = self.num_ranks * slots * dtype.itemsize
        return np.frombuffer(os.pread(self._file, size, offset), dtype).reshape(-1, slots)

    def links(self) -> Records:
        """[max_ranks] by peer."""
        return self._read(_LINK, self._links, 1)[:, 0]

    def chunks(self) -> Records:
        """[max_ranks, p2p_slots] by receiver."""
        return self._read(_CHUNK, self._chunks, self.p2p_slots)

    def requests(self) -> Records:
        """[max_ranks, row_slots] by server."""
        return self._read(_REQUEST, self._requests, self.row_slots)

    def replies(self) -> Records:
        """[max_ranks, row_slots] by asker."""
        return self._read(_REPLY, self._replies, self.row_slots)

    def is_linked(self, peer: int, other: _Heads) -> bool:
        """What lies here for `peer` is meant for its life `other`."""
        return int(self.links()[peer]["peer_incarnation"]) == other.incarnation


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE


@contextmanager
def _open(info: SegmentInfo) -> Iterator[_Heads]:
    _xccl.read_blob(info.run_id, info.name)  # checks owner, mode, magic, version and layout
    file = os.open(info.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        header = np.frombuffer(os.pread(file, _HEADER.itemsize, 0), _HEADER)[0]
        if os.fstat(file).st_size < int(header["total_bytes"]):
            raise SegmentError(f"{info.path} is smaller than its header says")
        yield _Heads(file, header)
    finally:
        os.close(file)


def _requests(heads: dict[int, _Heads], rank: int) -> Iterator[Transfer]:
    """Requests of a rank with their answers.

    A slot is written again only after its request was answered and its answer read. So a request
    that reads the same before and after its answer was read belongs to it, unless the next one is
    being written: then their tags differ.
    """
    asker = heads[rank]
    before = asker.requests()
    replies = {
        peer: server.replies()[rank]
        for peer, server in heads.items()
        if server.is_linked(rank, asker) and asker.is_linked(peer, server)
    }
    after = asker.requests()
    for peer, slot in np.argwhere((before["seq"] > 0) & (before == after)):
        reply = replies[peer][slot] if peer in replies else None
        request = before[peer, slot]
        if reply is None or reply["seq"] != request["seq"]:
            yield _request(rank, int(peer), request, None)
        elif all(reply[name] == request[name] for name in _TAG):
            yield _request(rank, int(peer), request, reply)


def _request(rank: int, peer: int, request: Any, reply: Any | None) -> Transfer:
    start_ns = int(request["sent_ns"]) or None
    state, end_ns = "waiting", 0
    if reply is not None:
        state, end_ns = _CODES[min(int(reply["code"]), 2)], int(reply["sent_ns"])
    elif request["cancel"] == request["seq"]:
        state = "given up"
    return Transfer(
        rank=rank,
        peer=peer,
        kind=TransferKind.REQUEST,
        state=state,
        num_bytes=4 * int(request["num_meta"]) + _row_bytes(request),
        reply_bytes=0 if reply is None else _row_bytes(reply),
        sequence=int(request["seq"]),
        start_ns=start_ns,
        duration_ns=end_ns - start_ns if start_ns and end_ns else None,
        **{name: int(request[name]) for name in _TAG},
    )


def _row_bytes(header: Any) -> int:
    """Of the rows of a request or reply, and their scales."""
    scale_bytes = 4 if int(header["row_type"]) == INT8_ROWS else 0
    return int(header["num_rows"]) * (int(header["row_bytes"]) + scale_bytes)


def _chunks(heads: dict[int, _Heads], rank: int) -> Iterator[Transfer]:
    """Chunks of a rank; taken when the receiver's credits say so."""
    sender = heads[rank]
    before, after = sender.chunks(), sender.chunks()
    taken = {
        peer: int(receiver.links()[rank]["p2p_received"])
        for peer, receiver in heads.items()
        if receiver.is_linked(rank, sender) and sender.is_linked(peer, receiver)
    }
    for peer, slot in np.argwhere((before["event"] > 0) & (before == after)):
        chunk = before[peer, slot]
        yield Transfer(
            rank=rank,
            peer=int(peer),
            kind=TransferKind.CHUNK,
            state="taken" if taken.get(int(peer), 0) >= int(chunk["event"]) else "waiting",
            num_bytes=int(chunk["num_bytes"]),
            sequence=int(chunk["event"]),
            tag=int(chunk["tag"]),
        )
