"""Dispatch and combine among ranks that are attention and experts at once (colocated MoE).

    dispatch -> recv (everybody's rows for my experts) -> compute, reply -> combine

A collective: each rank of the group calls each verb once per tag, in this order. Unlike a2e/e2a,
`recv` waits for a message from every rank, because a step's expert computation is one batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdeepserve import _xccl
from xdeepserve.xccl.batch import F32, I32, Array, Batch
from xdeepserve.xccl.exchange import Exchange
from xdeepserve.xccl.layout import Tag
from xdeepserve.xccl.port import Port

STALE_EPOCH: int = _xccl.STALE_EPOCH
"""`detail` of the refusal of what was dispatched in an epoch that this rank has left."""


class EpGroup:
    """The EP ranks of one port. Owns early arrivals: a rank may be one step ahead.

    After a loss the ranks that live dispatch the step again in the next epoch; what the old one
    left behind is refused, so that its slots are free again.
    """

    def __init__(self, port: Port, ranks: Sequence[int]) -> None:
        self._port = port
        self._group = _xccl.EpGroup(port, sorted(ranks))

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
        exchange = Exchange(self._port, hidden_states, None, quantize)
        self._group.post(exchange, topk_ids, expert_rank, tag, timeout_s)
        return exchange

    def recv(self, tag: Tag, timeout_s: float = 30.0) -> list[Batch]:
        """Every rank's batch of `tag`, in rank order; each is to be answered.

        Raises:
            PeerLost: a rank that has not sent is dead or frozen.
            XcclTimeout: `ranks` lists those that have not sent.
        """
        return self._group.recv(tag, timeout_s)

    def reply(self, batches: list[Batch], rows: Array) -> None:
        """Answers the batches with consecutive shares of rows [pairs of all, width], copied.

        Large answers are better computed in place: `Batch.answer_buffer`.

        Raises:
            ValueError: more or fewer rows than pairs, or a batch was answered already.
        """
        self._group.reply(batches, rows)

    def combine(
        self, exchange: Exchange, topk_weights: F32, *, hidden_size: int, timeout_s: float = 30.0
    ) -> F32:
        """[T, H]: the weighted sum of the answers in slot order; releases the exchange."""
        try:
            return exchange.e2a(topk_weights, hidden_size=hidden_size, timeout_s=timeout_s)
        finally:
            exchange.release()
