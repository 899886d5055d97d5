"""XcclTransport: FFNs and experts in other processes, reached over XCCL, alive through failures.

    dispatch --> FFN leg and expert leg posted, own modules computed meanwhile
    combine  --> wait --> shared + routed
                  |
                  +-- rank lost: its share to a replica or another rank; nobody left: computed here

The hidden states stay here until the answers are in, so a lost rank costs time, never a token. A
module that no rank serves, by the routing table or at the moment, is computed by this process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.eplb import ExpertLoadStats
from xdeepserve.errors import PeerLost, XcclError, XcclTimeout
from xdeepserve.ops import F32, I32
from xdeepserve.transformerless.exchange_limit import DEFAULT_LIMIT, ExchangeLimit
from xdeepserve.transformerless.expert_share import ExpertShare
from xdeepserve.transformerless.legs import ExpertLeg, FfnLeg, Leg, is_answered
from xdeepserve.transformerless.moe_transport import DispatchHandle, StepTag, use_up
from xdeepserve.transformerless.own_experts import OwnExperts
from xdeepserve.transformerless.partition import Partition
from xdeepserve.transformerless.route_keeper import Route, RouteKeeper
from xdeepserve.transformerless.routing import NOBODY, LiveRouting
from xdeepserve.transformerless.stage_times import Stage, StageTimes
from xdeepserve.transformerless.xccl_handle import XcclHandle
from xdeepserve.xccl import Port, Tag

MAX_MOVES: Final = 16
"""Times that a leg is given to others before this process computes it itself."""

LINK_POLL_S: Final = 0.002

logger = logging.getLogger(__name__)


class XcclTransport:
    """MoeTransport of one DP group. Thread: the step loop."""

    def __init__(
        self,
        *,
        port: Port,
        units: Partition,
        routing: LiveRouting,
        stage_times: StageTimes,
        load_stats: ExpertLoadStats | None = None,
        share: ExpertShare | None = None,
        limit: ExchangeLimit = DEFAULT_LIMIT,
    ) -> None:
        """Connect the attention side to its modules.

        Args:
            port: of this DP group, closed with the transport; its layout holds a step's rows.
            units: computed here where nobody else does.
            routing: read at each dispatch.
            stage_times: where the stages of an exchange are counted.
            load_stats: where the tokens of each expert are counted; None = nowhere.
            share: which experts are computed here while others would be waited for; None = none.
            limit: how long an exchange waits, before what is not answered is computed here.
        """
        self._port = port
        self._units = units
        self._routes = RouteKeeper(port, routing)
        self._times = stage_times
        self._load_stats = load_stats
        self._share = share
        self._limit = limit
        self.num_exchanges = 0
        self.num_failovers = 0
        self.num_fallbacks = 0

    @property
    def num_late_answers(self) -> int:
        """Answers that came after their request had gone to others, and were dropped."""
        return self._port.num_late

    def wait_complete(self, *, timeout_s: float) -> bool:
        """Return when every module has a rank that answers; False if not in time."""
        deadline_s = SYSTEM_CLOCK.monotonic() + timeout_s
        while not self._routes.is_complete:
            if SYSTEM_CLOCK.monotonic() > deadline_s:
                return False
            time.sleep(LINK_POLL_S)
            self._routes.table()
        return True

    def dispatch(
        self, *, tag: StepTag, hidden_states: F32, topk_ids: I32 | None, topk_weights: F32 | None
    ) -> XcclHandle:
        """Send, then compute what this process does itself; see MoeTransport.dispatch."""
        deadline_s = self._limit.deadline_s()
        handle = XcclHandle(tag, hidden_states, topk_ids, topk_weights, deadline_s)
        with contextlib.ExitStack() as failure:
            failure.callback(handle.release)
            with self._times.measure(Stage.DISPATCH):
                if len(hidden_states):
                    self._send(handle)
            with self._times.measure(Stage.OWN_MODULES):
                self._compute(handle)
            failure.pop_all()
        return handle

    def _send(self, handle: XcclHandle) -> None:
        """Post the legs for modules that others serve."""
        layer_idx, table = handle.tag.layer_idx, self._routes.table()
        route = self._routes.route(handle.tag)
        tag = _tag(handle.tag, route)
        if route.ffn_rank != NOBODY and self._units.ffn[layer_idx] is not None:
            handle.ffn = FfnLeg(self._port, handle.hidden_states, route, tag)
            self._post(handle.ffn, handle)
        if not table.expert_ranks or handle.topk_ids is None:
            return
        if self._load_stats is not None:
            self._load_stats.record(layer_idx, handle.topk_ids)
        if route.has_experts:
            ids = self._others_ids(handle, route.num_experts)
            # Layers of a step take turns as well, or one layer's ranks would rest together.
            instances = table.instances(layer_idx, ids, handle.tag.step_idx + layer_idx)
            handle.experts = ExpertLeg(self._port, handle.hidden_states, instances, route, tag)
            self._post(handle.experts, handle)

    def _others_ids(self, handle: XcclHandle, num_experts: int) -> I32:
        """[T, K] experts that are asked of others; -1 = computed here, or skipped."""
        assert handle.topk_ids is not None, "an MoE layer routes"
        is_own = None if self._share is None else self._share.choose(handle.topk_ids, num_experts)
        if is_own is None:
            return handle.topk_ids
        handle.own_experts = OwnExperts(handle.topk_ids, is_own)
        return handle.own_experts.others_ids

    def _compute(self, handle: XcclHandle) -> None:
        """Compute the modules that nobody else does, unless that is done already."""
        ffn = self._units.ffn[handle.tag.layer_idx]
        if ffn is not None and handle.ffn is None and handle.shared is None:
            handle.shared = ffn(handle.hidden_states)
        experts = self._units.experts[handle.tag.layer_idx]
        if experts is None or handle.routed is not None:
            return
        if handle.experts is not None:
            if handle.own_experts is not None:
                handle.own_experts.compute(experts, handle.hidden_states)
            return
        assert handle.topk_ids is not None, "an MoE layer routes"
        assert handle.topk_weights is not None, "an MoE layer weighs"
        handle.routed = experts.routed(handle.hidden_states, handle.topk_ids, handle.topk_weights)

    def _post(self, leg: Leg, handle: XcclHandle) -> None:
        # A slot that a lost rank blocks is posted by the wait, after its share has moved.
        with contextlib.suppress(PeerLost, XcclTimeout):
            leg.exchange.post(self._limit.left_s(handle.deadline_s))

    def combine(self, handle: DispatchHandle) -> F32:
        """Wait, then add; see MoeTransport.combine.

        Raises:
            IntegrityError: the handle was used before, or is not this transport's.
            XcclError: a rank refuses what it was asked: it runs another model.
        """
        exchange = use_up(handle, XcclHandle)
        try:
            self._learn(exchange)
            with self._times.measure(Stage.WAIT):
                self._settle(exchange)
            with self._times.measure(Stage.OWN_MODULES):
                self._compute(exchange)
            with self._times.measure(Stage.COMBINE):
                return exchange.add_up(self._units.experts[exchange.tag.layer_idx])
        finally:
            self.num_exchanges += 1
            exchange.release()

    def _learn(self, handle: XcclHandle) -> None:
        """Whether the experts of others were slower than what was done here meanwhile."""
        if self._share is not None and handle.experts is not None:
            was_ready = is_answered(handle.experts)
            self._share.learn(len(handle.hidden_states), was_ready=was_ready)

    def _settle(self, handle: XcclHandle) -> None:
        """Return when every leg is answered or given up."""
        while True:
            if handle.ffn is not None and not self._finish(handle.ffn, handle):
                handle.give_up_ffn()
            if handle.experts is not None and not self._finish(handle.experts, handle):
                handle.give_up_experts()
            # The answer of one may be lost with its rank while the other is waited for.
            if handle.is_answered():
                return

    def _finish(self, leg: Leg, handle: XcclHandle) -> bool:
        """Return when the leg is answered, by whomever; False when nobody does so in time."""
        tag = handle.tag
        for _ in range(MAX_MOVES):
            try:
                leg.exchange.wait(self._limit.left_s(handle.deadline_s))
            except PeerLost as lost:
                if not self._move(leg, lost.ranks, tag):
                    break
                continue
            except XcclTimeout as late:
                logger.error("%s: ranks %s do not answer", tag, late.ranks)
                self._routes.avoid(late.ranks)
                break
            if refused := leg.exchange.refused_ranks:
                raise XcclError(f"{tag}: ranks {refused} refuse to compute it", tuple(refused))
            return True
        self.num_fallbacks += 1
        return False

    def _move(self, leg: Leg, ranks: Sequence[int], tag: StepTag) -> bool:
        """Give the share of lost ranks to others; False when there are none."""
        self._routes.look()
        route = self._routes.route(tag)
        has_moved = leg.move(ranks, route, _tag(tag, route))
        self.num_failovers += has_moved
        return has_moved

    def release(self, handle: DispatchHandle) -> None:
        """Forget an exchange; see MoeTransport.release."""
        use_up(handle, XcclHandle).release()

    def close(self) -> None:
        """Close the port. Idempotent."""
        self._port.close()


def _tag(tag: StepTag, route: Route) -> Tag:
    return Tag(route.epoch, tag.step_idx, tag.layer_idx, tag.microbatch_idx)
