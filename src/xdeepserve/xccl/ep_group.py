"""Dispatch and combine among ranks that are attention and experts at once (colocated MoE).

    dispatch -> recv (everybody's rows for my experts) -> compute, reply -> combine

A collective: each rank of the group calls each verb once per tag, in this order. Unlike a2e/e2a,
`recv` waits for a message from every rank, because a step's expert computation is one batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from xdeepserve.errors import PeerLost, XcclTimeout
from xdeepserve.xccl.batch import F32, I32, Array, Batch
from xdeepserve.xccl.exchange import Exchange
from xdeepserve.xccl.layout import Tag
from xdeepserve.xccl.port import PeerState, Port

_SLICE_S = 0.05


class EpGroup:
    """The EP ranks of one port. Owns early arrivals: a rank may be one step ahead."""

    def __init__(self, port: Port, ranks: Sequence[int]) -> None:
        self._port = port
        self._ranks = tuple(sorted(ranks))
        self._early: dict[Tag, dict[int, Batch]] = {}

    def dispatch(
        self,
        *,
        tag: Tag,
        hidden_states: Array,
        topk_ids: I32,
        expert_rank: I32,
        quantize: bool = False,
        timeout_s: float = 30.0,
    ) -> Exchange:
        """Sends rows to their experts' ranks, and word to all; as `Port.a2e`."""
        exchange = self._port.exchange(hidden_states, quantize=quantize)
        pairs, top_k = topk_ids.reshape(-1), topk_ids.shape[1]
        exchange.add_routed(pairs, top_k, None, expert_rank, tag, 0, self._ranks)
        exchange.post(timeout_s)
        return exchange

    def recv(self, tag: Tag, timeout_s: float = 30.0) -> list[Batch]:
        """Every rank's batch of `tag`, in rank order; each is to be answered.

        Raises:
            PeerLost: a rank that has not sent is dead or frozen.
            XcclTimeout: `ranks` lists those that have not sent.
        """
        deadline = time.monotonic() + timeout_s
        arrived = self._early.setdefault(tag, {})
        while len(arrived) < len(self._ranks):
            left_s = deadline - time.monotonic()
            if not self._poll(max(0.0, min(left_s, _SLICE_S))):
                self._check(tag, arrived, left_s)
        del self._early[tag]
        return [arrived[rank] for rank in self._ranks]

    def combine(
        self, exchange: Exchange, topk_weights: F32, *, hidden_size: int, timeout_s: float = 30.0
    ) -> F32:
        """[T, H]: the weighted sum of the answers in slot order; releases the exchange."""
        with exchange:
            return exchange.e2a(topk_weights, hidden_size=hidden_size, timeout_s=timeout_s)

    def _poll(self, timeout_s: float) -> bool:
        """Takes what arrives; whether anything did."""
        batches = self._port.poll(timeout_s)
        for batch in batches:
            self._early.setdefault(batch.tag, {})[batch.source_rank] = batch
        return bool(batches)

    def _check(self, tag: Tag, arrived: dict[int, Batch], left_s: float) -> None:
        missing = tuple(rank for rank in self._ranks if rank not in arrived)
        states = {rank: self._port.status_of(rank).state for rank in missing}
        self._poll(0.0)  # what a rank sent before it left counts
        lost = tuple(
            rank
            for rank, state in states.items()
            if state is not PeerState.ALIVE and rank not in arrived
        )
        if lost:
            raise PeerLost(f"dispatch {tag}: ranks {lost} are dead or frozen", lost)
        if left_s <= 0:
            raise XcclTimeout(f"dispatch {tag}: nothing from ranks {missing}", missing)
