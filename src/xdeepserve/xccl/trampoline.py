"""Trampoline forward: a subset of the expert ranks receives first, then forwards to the others.

    asker --kind FORWARD, all pairs--> trampoline --a2e--> owners (itself included)
    asker <--one row per pair--------- trampoline <--e2a-- owners

An asker writes each row once, to one rank, instead of once per owner; useful where many owners
share few askers. The published system does this between 160 attention and 288 expert dies.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xdeepserve.errors import PeerLost, XcclTimeout
from xdeepserve.xccl.batch import I32, Batch
from xdeepserve.xccl.exchange import Exchange
from xdeepserve.xccl.port import Port

LOST_DETAIL = 0xFFFF_FF01
"""`detail` of the refusal when an owner was lost on the way: the asker routes around it."""


class Trampoline:
    """Forwards of one expert rank; driven by its loop, never waits by itself.

    Call `forward` for each batch of kind FORWARD and `progress` once per turn of the loop; wait
    with `port.wait_any(trampoline.exchanges, timeout_s, True)`.
    """

    def __init__(self, port: Port, *, hidden_size: int) -> None:
        self._port = port
        self._hidden_size = hidden_size
        self._open: list[tuple[Batch, Exchange]] = []

    @property
    def exchanges(self) -> Sequence[Exchange]:
        """What is under way."""
        return [exchange for _, exchange in self._open]

    def forward(self, batch: Batch, expert_rank: I32) -> None:
        """Sends a batch's pairs to the owners of their experts, straight from the asker's slot."""
        rows, experts = np.ascontiguousarray(batch.pairs.T)
        exchange = self._port.exchange(batch.rows, scales=batch.scales)
        exchange.add_routed(experts, 1, rows, expert_rank, batch.tag, 0, [])
        self._open.append((batch, exchange))
        self.progress()

    def progress(self) -> int:
        """Answers the askers whose forwards are complete; returns how many."""
        before = len(self._open)
        self._open = [under_way for under_way in self._open if not self._end(*under_way)]
        return before - len(self._open)

    def _end(self, batch: Batch, exchange: Exchange) -> bool:
        try:
            exchange.wait(0.0)
        except XcclTimeout:
            return False
        except PeerLost:
            batch.refuse(LOST_DETAIL)
            exchange.release()
            return True
        if exchange.refused_ranks:
            batch.refuse(exchange.parts[0].detail)
        else:
            self._answer(batch, exchange)
        exchange.release()
        return True

    def _answer(self, batch: Batch, exchange: Exchange) -> None:
        num_pairs = len(batch.pairs)
        out = batch.answer_buffer(num_pairs, self._hidden_size)
        if out is None:
            return
        exchange.gather(out)
        batch.commit(num_pairs, self._hidden_size)
