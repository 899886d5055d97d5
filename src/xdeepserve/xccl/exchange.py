"""An exchange as the asking rank sees it: parts per rank, their answers, and what to do on a loss.

a2e / add -> post -> wait -> combine | gather | replies -> release
                      |
                      +-- PeerLost, refused -> reroute (new table, new epoch) -> wait
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType

import numpy as np

from xdeepserve import _xccl
from xdeepserve.xccl.batch import F32, I32, Array
from xdeepserve.xccl.layout import Tag


class PartState(IntEnum):
    """Of one rank's part."""

    PLANNED = 0
    WAITING = 1
    ANSWERED = 2
    REFUSED = 3
    LOST = 4
    MOVED = 5


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's share. `detail` is the server's number beside a refusal."""

    rank: int
    state: PartState
    detail: int


def make_part(rank: int, state: PartState, detail: int) -> Part:
    """A part; only a refusal has a detail, whatever an earlier answer left in its slot."""
    return Part(rank, state, detail if state is PartState.REFUSED else 0)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, in place until the exchange is released.

    Attributes:
        rank: who answered.
        slots: [P] flat (token * K + k) of each row of a routed part; empty for other parts.
        rows: [R, width] view.
        scales: [R] view with int8 rows, else None.
    """

    rank: int
    slots: I32
    rows: Array
    scales: F32 | None


class Exchange(_xccl.Exchange):
    """Rows under way to other ranks. `rows` and ids must stay unchanged until `release`.

    Made by `Port.exchange` or `Port.a2e`. Thread: the port's.
    """

    def add(
        self,
        rank: int,
        *,
        tag: Tag,
        kind: int = 0,
        row_idx: I32 | None = None,
        meta: I32 | None = None,
        reply_rows: int = 0,
    ) -> None:
        """Plans a part for one rank; nothing is sent before `post` or `wait`.

        Args:
            rank: who shall answer.
            tag: echoed in the answer.
            kind: 0 to 65534, passed on to the server.
            row_idx: [n] int32 rows to send; None for all.
            meta: [m] int32, passed on to the server.
            reply_rows: rows expected back, passed on; 0: unsaid.
        """
        self.add_rows(rank, tag, kind, row_idx, meta, reply_rows)

    @property
    def parts(self) -> list[Part]:
        """Ranks, states and refusals, in the order in which parts were planned."""
        return [make_part(rank, PartState(s), detail) for rank, s, detail in self.part_states()]

    @property
    def refused_ranks(self) -> list[int]:
        """Ranks that answered that they do not serve what they were asked."""
        return [part.rank for part in self.parts if part.state is PartState.REFUSED]

    def replies(self) -> list[Reply]:
        """The answers so far, in the order of parts; views in place."""
        return [
            Reply(rank, np.array(slots, np.int32), rows, scales)
            for rank, slots, rows, scales in self.reply_views()
        ]

    def e2a(self, topk_weights: F32, *, hidden_size: int, timeout_s: float = 30.0) -> F32:
        """Waits for all answers and combines them: [T, H], summed in slot order from 0.

        Args:
            topk_weights: [T, K] float32.
            hidden_size: H, the width of the answers.
            timeout_s: how long to wait.

        Raises:
            PeerLost, XcclTimeout: as `wait`; `reroute` and call again.
            XcclError: a rank refused, or an answer has another shape.
        """
        out = np.empty((len(topk_weights), hidden_size), np.float32)
        self.wait_combine(topk_weights, out, timeout_s)
        return out

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
