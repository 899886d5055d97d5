"""LocalTransport: the MoE transport whose network is a function call (colocated experts).

It takes the same way as a transport between processes: logical ids become physical ids by the
routing table, rows are sorted by physical expert, each host computes its range of them, and the
answers are combined in top-k slot order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xdeepserve.errors import IntegrityError
from xdeepserve.models.decoder import Model
from xdeepserve.models.moe import permute_by_expert
from xdeepserve.models.units import ExpertUnit
from xdeepserve.ops import F32, I32
from xdeepserve.transformerless.moe_transport import DispatchHandle, StepTag
from xdeepserve.transformerless.partition import Partition, partition
from xdeepserve.transformerless.routing import LiveRouting, RoutingTable


class LocalHandle:
    """An exchange that waits to be computed by `combine`."""

    __slots__ = ("hidden_states", "is_open", "table", "tag", "topk_ids", "topk_weights")

    def __init__(
        self,
        tag: StepTag,
        table: RoutingTable,
        hidden_states: F32,
        topk_ids: I32 | None,
        topk_weights: F32 | None,
    ) -> None:
        self.tag = tag
        self.table = table
        self.hidden_states = hidden_states
        self.topk_ids = topk_ids
        self.topk_weights = topk_weights
        self.is_open = True


class LocalTransport:
    """MoeTransport over units of this process. Holds no state between exchanges."""

    def __init__(
        self,
        *,
        units: Partition,
        routing: LiveRouting,
        expert_ranges: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        """Connect the units.

        Args:
            units: of one model.
            routing: its tables have as many physical experts as the ranges together.
            expert_ranges: [start, stop) of logical experts per host, overlapping where experts
                are replicated; physical ids count through them in order. None = one host has all.
        """
        self._routing = routing
        self._ffn = units.ffn
        self._hosts = tuple(_split(experts, expert_ranges) for experts in units.experts)

    def dispatch(
        self, *, tag: StepTag, hidden_states: F32, topk_ids: I32 | None, topk_weights: F32 | None
    ) -> LocalHandle:
        """Open an exchange; see MoeTransport.dispatch."""
        return LocalHandle(tag, self._routing.current, hidden_states, topk_ids, topk_weights)

    def combine(self, handle: DispatchHandle) -> F32:
        """Compute the exchange; see MoeTransport.combine.

        Raises:
            IntegrityError: the handle was used before, or is not this transport's.
        """
        exchange = _use_up(handle)
        ffn = self._ffn[exchange.tag.layer_idx]
        shared = None if ffn is None else ffn(exchange.hidden_states)
        if exchange.topk_ids is None or exchange.topk_weights is None:
            assert shared is not None, "a dense layer has an FFN unit"
            return shared
        routed = self._routed(exchange, exchange.topk_ids, exchange.topk_weights)
        return routed if shared is None else shared + routed

    def _routed(self, exchange: LocalHandle, topk_ids: I32, topk_weights: F32) -> F32:
        """[T, H] from the hosts' experts."""
        layer_idx = exchange.tag.layer_idx
        hosts = self._hosts[layer_idx]
        physical_ids = exchange.table.to_physical(layer_idx, topk_ids)
        permutation = permute_by_expert(physical_ids, sum(host.num_experts for host in hosts))
        rows = exchange.hidden_states[permutation.token_of_row]
        outputs = _run_hosts(hosts, rows, permutation.num_tokens_per_expert)
        return hosts[0].ops.combine_topk(outputs, permutation.row_of_slot, topk_weights)

    def release(self, handle: DispatchHandle) -> None:
        """Forget an exchange; see MoeTransport.release."""
        _use_up(handle)

    def close(self) -> None:
        """Nothing to free."""


def colocated(model: Model) -> tuple[LocalTransport, LiveRouting]:
    """The transport of a model whose experts are all in this process, and its routing."""
    moe = model.spec.moe
    num_experts = 0 if moe is None else moe.gate.num_experts
    routing = LiveRouting(
        RoutingTable.identity(num_layers=model.spec.num_layers, num_experts=num_experts)
    )
    return LocalTransport(units=partition(model), routing=routing), routing


def _use_up(handle: DispatchHandle) -> LocalHandle:
    if not isinstance(handle, LocalHandle):
        raise IntegrityError(f"exchange {handle.tag} belongs to another transport")
    if not handle.is_open:
        raise IntegrityError(f"exchange {handle.tag} was already combined or released")
    handle.is_open = False
    return handle


def _split(
    experts: ExpertUnit | None, expert_ranges: Sequence[tuple[int, int]] | None
) -> tuple[ExpertUnit, ...]:
    if experts is None:
        return ()
    if expert_ranges is None:
        return (experts,)
    return tuple(experts.experts(start, stop) for start, stop in expert_ranges)


def _run_hosts(hosts: tuple[ExpertUnit, ...], rows: F32, num_tokens_per_expert: I32) -> F32:
    """[R, H]; rows are sorted by physical expert, so each host's share is consecutive."""
    if len(hosts) == 1:
        return hosts[0](rows, num_tokens_per_expert)
    outputs, expert, row = [], 0, 0
    for host in hosts:
        counts = num_tokens_per_expert[expert : expert + host.num_experts]
        num_rows = int(counts.sum())
        outputs.append(host(rows[row : row + num_rows], counts))
        expert += host.num_experts
        row += num_rows
    return np.concatenate(outputs)
