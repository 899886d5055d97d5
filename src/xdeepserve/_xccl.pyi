"""Types of XCCL's compiled core; `xdeepserve.xccl` documents the verbs. Arrays are C-contiguous."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from xdeepserve.xccl.layout import Tag

BLOB_BYTES: int
FORWARD: int
STALE_EPOCH: int

_Array = npt.NDArray[Any]
_F32 = npt.NDArray[np.float32]
_I32 = npt.NDArray[np.int32]
_Tag = tuple[int, int, int, int]

class LayoutParams:
    def __init__(
        self,
        max_ranks: int,
        p2p_slots: int,
        p2p_slot_bytes: int,
        row_slots: int,
        request_bytes: int,
        reply_bytes: int,
        window_bytes: int,
    ) -> None: ...
    @property
    def segment_bytes(self) -> int: ...

class Batch:
    """One request, to be answered exactly once by `reply`, `commit` or `refuse`."""

    @property
    def tag(self) -> Tag:
        """Names the exchange."""
    @property
    def kind(self) -> int:
        """The asker's number for what it wants; FORWARD for a trampoline."""
    @property
    def source_rank(self) -> int:
        """The asker."""
    @property
    def source_incarnation(self) -> int:
        """The life of the asker that sent it."""
    @property
    def num_rows(self) -> int:
        """Rows sent."""
    @property
    def reply_rows(self) -> int:
        """Rows the asker expects back; 0 where it does not say."""
    @property
    def meta(self) -> _I32:
        """[num_meta] int32 view of the metadata."""
    @property
    def pairs(self) -> _I32:
        """[P, 2] view of (row, expert) of a routed request, sorted by expert."""
    @property
    def rows(self) -> _Array:
        """[num_rows, width] view: float32, uint16 (bfloat16 bits), int8 or uint8."""
    @property
    def scales(self) -> _F32 | None:
        """[num_rows] float32 view of int8 rows' scales; None for other rows."""
    def reply(self, rows: _Array, scales: _F32 | None = None, quantize: bool = False) -> bool:
        """Copies the answer to where the asker looks for it, and wakes the asker.

        Args:
            rows: [R, width] float32, uint16 (bfloat16 bits), int8 or uint8, C-contiguous.
            scales: [R] float32, with int8 rows.
            quantize: send float32 or bfloat16 rows as int8 with one scale each.

        Returns:
            False when the asker's life has ended, so that nobody waits.

        Raises:
            ValueError: larger than reply_bytes, or answered already.
        """
    def answer_buffer(self, num_rows: int, width: int) -> _F32 | None:
        """[num_rows, width] float32 to compute the answer in place; then `commit`.

        None when the asker's life has ended.
        """
    def commit(self, num_rows: int, width: int) -> bool:
        """Publishes what was computed in `answer_buffer(num_rows, width)`; as `reply`."""
    def refuse(self, detail: int = 0) -> bool:
        """Answers that this rank does not serve what was asked; `detail` (u32) says why."""

class EpGroup:
    """A rank's place in an EP group. Owns early requests of later steps."""

    def __init__(self, port: Port, ranks: Sequence[int]) -> None: ...
    def post(
        self,
        exchange: Exchange,
        topk_ids: _I32,
        expert_rank: _I32,
        tag: _Tag,
        timeout_s: float,
    ) -> None:
        """`post_routed`, with a part for every rank; enters the epoch of the tag."""
    def recv(self, tag: _Tag, timeout_s: float = 30.0) -> list[Batch]:
        """Each rank's request of `tag`, in rank order. Raises PeerLost, XcclTimeout."""
    def reply(self, batches: Sequence[Batch], rows: _Array) -> None:
        """Answers each batch with its consecutive share of the rows."""

class SendHandle:
    """A message under way. Dropping it unfinished gives the message up."""

    def __init__(self, port: Port, to: int, data: object, tag: int = 0) -> None: ...
    def test(self) -> bool:
        """True when the data are in the ring and their buffer is free again. Raises PeerLost."""
    def wait(self, timeout_s: float = 30.0) -> None:
        """Until `test()` would be true. Raises PeerLost, XcclTimeout."""

class RecvHandle:
    """A message expected into a buffer."""

    def __init__(self, port: Port, from_rank: int, out: object) -> None: ...
    def test(self) -> bool:
        """True when the message is in the buffer. Raises PeerLost, ValueError as `wait`."""
    def wait(self, timeout_s: float = 30.0) -> tuple[int, int]:
        """(bytes, tag). Raises PeerLost, XcclTimeout, ValueError (larger than the buffer)."""

class Port:
    def __init__(
        self, run_id: str, name: str, rank: int, params: LayoutParams, frozen_after_s: float
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def window_offset(self) -> int: ...
    @property
    def num_open_requests(self) -> int:
        """Requests taken and not answered."""
    @property
    def num_cancelled(self) -> int:
        """Requests that were given up before they were taken."""
    @property
    def num_late(self) -> int:
        """Answers that came after their exchange was given up, and were dropped."""
    def blob(self) -> bytes:
        """[BLOB_BYTES] what a peer needs to attach this rank."""
    def attach(self, blob: bytes) -> None:
        """Maps a life of a peer and resets the pair. The same life again changes nothing.

        Raises SegmentError: another run, layout, version, owner, mode or an older life.
        """
    def unlink(self) -> bool:
        """Removes the segment's name, if it is still this life's; mappings stay."""
    def close_segment(self) -> None: ...
    def beat(self) -> None:
        """Shows that the loop is alive; for long computations. Any thread."""
    def ring_self(self) -> None:
        """Wakes this port's wait, so that it asks its condition again. Any thread."""
    def is_linked(self, rank: int) -> bool:
        """Both sides have attached each other's present life."""
    def peer_status(self, rank: int) -> tuple[int, int, int, float]: ...
    def peer_incarnation(self, rank: int) -> int: ...
    def own_bytes(self) -> _Array: ...
    def open_trace(self, capacity: int) -> None:
        """Keeps the last `capacity` transfers; 0 stops."""
    def take_trace(self) -> list[tuple[int, int, int, int, int, int, int, int, int]]: ...
    def send(self, to: int, data: object, tag: int = 0, timeout_s: float = 30.0) -> None:
        """Copies a bytes-like object to a rank's ring; returns when all of it is there.

        Raises PeerLost, XcclTimeout (no credits), XcclError (an isend is unfinished).
        """
    def recv(self, from_rank: int, out: object, timeout_s: float = 30.0) -> tuple[int, int]:
        """The next message of a rank into a writable buffer: (bytes, tag).

        Raises PeerLost, XcclTimeout, ValueError (larger than the buffer; it stays).
        """
    def lend(self, from_rank: int, timeout_s: float = 30.0) -> tuple[_Array, int, int, int, int]:
        """The next chunk in place: (view, chunk_idx, num_chunks, tag, total bytes).

        Valid until `give_back`, which must follow before the next receive of this rank.
        """
    def give_back(self, from_rank: int) -> None: ...
    def flush(self, to: int, timeout_s: float = 30.0) -> None:
        """Until the rank has taken everything sent to it."""
    def put(self, rank: int, offset: int, data: object) -> None:
        """Stores bytes in a rank's window; `signal` or `add` makes them known."""
    def get(self, rank: int, offset: int, out: object) -> None:
        """Loads bytes of a rank's window."""
    def signal(self, rank: int, offset: int, value: int) -> None:
        """Stores a u64 after all puts before it, and wakes the rank."""
    def add(self, rank: int, offset: int, value: int) -> None:
        """Adds to a u64 atomically, after all puts before it, and wakes the rank."""
    def wait_signal(
        self, offset: int, at_least: int, timeout_s: float = 30.0, owed: Sequence[int] = ()
    ) -> int:
        """Until the u64 in the own window is >= at_least; its value. `owed`: whose loss ends it."""
    def poll(self, timeout_s: float = 0.0, max_requests: int = 64) -> list[Batch]:
        """Whatever has arrived from any rank, oldest first per rank; [] at the deadline.

        Sleeps until a request of anybody comes. Requests that their asker has given up are
        answered on the way and not returned.
        """
    def wait_any(
        self, exchanges: Sequence[Exchange], timeout_s: float, or_requests: bool = False
    ) -> bool:
        """Until an exchange's `is_done()` is true or raises, or requests are there.

        False: the deadline, a `ring_self`-driven caller should look again, or a rank that owes is
        dead or frozen.
        """
    def num_open_slots(self, rank: int) -> int: ...

class Exchange:
    def __init__(
        self, port: Port, rows: _Array, scales: _F32 | None = None, quantize: bool = False
    ) -> None: ...
    def add_rows(
        self,
        rank: int,
        tag: _Tag,
        kind: int,
        row_idx: _I32 | None = None,
        meta: _I32 | None = None,
        reply_rows: int = 0,
    ) -> None: ...
    def add_routed(
        self,
        experts: _I32,
        top_k: int,
        pair_rows: _I32 | None,
        expert_rank: _I32,
        tag: _Tag,
        kind: int,
        also: Sequence[int],
    ) -> None: ...
    def post_routed(
        self,
        topk_ids: _I32,
        expert_rank: _I32,
        tag: _Tag,
        kind: int,
        timeout_s: float,
    ) -> None:
        """`add_routed` of ids [T, K], then `post`."""
    def reroute(self, ranks: Sequence[int], expert_rank: _I32, tag: _Tag) -> bool:
        """Plans the unanswered pairs of `ranks` anew, under a tag of a higher epoch.

        Their old requests are given up; a late answer is dropped. True when there were any.
        """
    def resend(self, from_rank: int, to: int, tag: _Tag) -> bool:
        """Sends the unanswered, unrouted parts of a rank to another one."""
    def post(self, timeout_s: float) -> None:
        """Sends what is planned; waits only while no slot is free. Raises as `wait`."""
    def is_done(self) -> bool:
        """Sends what can be sent, collects; True when every part is answered or refused.

        Raises PeerLost and ValueError as `wait`.
        """
    def wait(self, timeout_s: float) -> None:
        """Until `is_done()`, after sending what is planned.

        Raises PeerLost (ranks dead or frozen), XcclTimeout (ranks owing), ValueError (a request
        exceeds request_bytes).
        """
    def part_states(self) -> list[tuple[int, int, int]]: ...
    def reply_views(self) -> list[tuple[int, list[int], _Array, _F32 | None]]:
        """(rank, slots, rows, scales) of each answer so far; views in place."""
    def gather(self, out: _F32) -> None:
        """out [T*K, H]: row t*K + k = the answer to pair (t, k); rows of id -1 stay."""
    def combine(self, topk_weights: _F32, out: _F32) -> None:
        """out [T, H] = sum over k ascending of topk_weights[t, k] * answer, from 0."""
    def wait_combine(self, topk_weights: _F32, out: _F32, timeout_s: float) -> None:
        """`wait`, then `combine`."""
    def release(self) -> None:
        """Gives up what is outstanding and frees the slots. Idempotent."""

def read_blob(run_id: str, name: str) -> bytes:
    """The blob of a segment in /dev/shm. Raises SegmentError."""

def describe_blob(blob: bytes) -> tuple[str, str, int, int, int, int]:
    """(run_id, name, rank, pid, incarnation, bytes) of a checked blob. Raises SegmentError."""

def is_running(blob: bytes) -> bool:
    """The owner's process runs and has not closed the segment."""

def cache_line_round_trip(cpu_a: int, cpu_b: int, rounds: int = 20000, repeats: int = 5) -> float:
    """Seconds that a cache line takes to another core and back: the ceiling of any message."""

def arm_fault(name: str, countdown: int = 1) -> None:
    """Tests only: SIGKILL this process at the countdown-th visit of a point; "delays"; "none"."""

def fault_names() -> list[str]:
    """The points of `arm_fault`."""
