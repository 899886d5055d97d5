"""XcclTransport: FFNs and experts in other processes, reached over XCCL, alive through failures.

    dispatch --> FFN leg and expert leg posted, own units computed meanwhile
    combine  --> wait --> shared + routed
                  |
                  +-- rank lost: its share to a replica, to another rank, or to its next life

The hidden states stay here until the answers are in, so a lost rank costs time, never a token. A
module without ranks in the routing table is computed by this process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.errors import IntegrityError, PeerLost, XcclError, XcclTimeout
from xdeepserve.models.moe import run_experts
from xdeepserve.ops import F32, I32
from xdeepserve.transformerless.legs import ExpertLeg, FfnLeg, Leg
from xdeepserve.transformerless.moe_transport import DispatchHandle, StepTag
from xdeepserve.transformerless.partition import Partition
from xdeepserve.transformerless.route_keeper import Route, RouteKeeper
from xdeepserve.transformerless.routing import LiveRouting
from xdeepserve.transformerless.stage_times import Stage, StageTimes
from xdeepserve.xccl import Port, Tag

EXCHANGE_TIMEOUT_S: Final = 120.0
"""How long a step waits for a module that nobody serves before the DP group gives up."""

RETRY_S: Final = 0.002
"""Between two looks for somebody who takes over."""

logger = logging.getLogger(__name__)


class XcclHandle:
    """An exchange under way: what was asked of others, and what was computed here."""

    __slots__ = ("experts", "ffn", "is_open", "routed", "shared", "tag", "topk_weights")

    def __init__(self, tag: StepTag, topk_weights: F32 | None) -> None:
        self.tag = tag
        self.topk_weights = topk_weights
        self.ffn: FfnLeg | None = None
        self.experts: ExpertLeg | None = None
        self.shared: F32 | None = None
        self.routed: F32 | None = None
        self.is_open = True

    def release(self) -> None:
        """Free the slots of both legs."""
        for leg in (self.ffn, self.experts):
            if leg is not None:
                leg.exchange.release()


class XcclTransport:
    """MoeTransport of one DP group. Thread: the step loop."""

    def __init__(
        self,
        *,
        port: Port,
        units: Partition,
        routing: LiveRouting,
        stage_times: StageTimes,
        timeout_s: float = EXCHANGE_TIMEOUT_S,
    ) -> None:
        """Connect the attention side to its modules.

        Args:
            port: of this DP group, closed with the transport; its layout holds a step's rows.
            units: computed here where the table names no rank.
            routing: read at each dispatch.
            stage_times: where the stages of an exchange are counted.
            timeout_s: how long an exchange may stay unanswered.
        """
        self._port = port
        self._units = units
        self._routes = RouteKeeper(port, routing)
        self._times = stage_times
        self._timeout_s = timeout_s
        self.num_failovers = 0

    def dispatch(
        self, *, tag: StepTag, hidden_states: F32, topk_ids: I32 | None, topk_weights: F32 | None
    ) -> XcclHandle:
        """Send, then compute what this process does itself; see MoeTransport.dispatch."""
        handle = XcclHandle(tag, topk_weights)
        with self._times.measure(Stage.DISPATCH):
            self._send(handle, hidden_states, topk_ids)
        with self._times.measure(Stage.OWN_MODULES):
            self._compute(handle, hidden_states, topk_ids)
        return handle

    def _send(self, handle: XcclHandle, hidden_states: F32, topk_ids: I32 | None) -> None:
        """Post the legs for modules that others serve."""
        layer_idx, table = handle.tag.layer_idx, self._routes.table()
        if len(hidden_states) == 0:
            return
        if table.ffn_ranks and self._units.ffn[layer_idx] is not None:
            route = self._wait_for_route(layer_idx)
            tag = _tag(handle.tag, route)
            handle.ffn = FfnLeg(self._port, hidden_states, route, tag)
            self._post(handle.ffn)
        if table.expert_ranks and topk_ids is not None:
            route = self._wait_for_route(layer_idx)
            instances = table.instances(layer_idx, topk_ids)
            tag = _tag(handle.tag, route)
            handle.experts = ExpertLeg(self._port, hidden_states, instances, route, tag)
            self._post(handle.experts)

    def _compute(self, handle: XcclHandle, hidden_states: F32, topk_ids: I32 | None) -> None:
        """Compute the modules that no rank serves."""
        ffn = self._units.ffn[handle.tag.layer_idx]
        if ffn is not None and handle.ffn is None:
            handle.shared = ffn(hidden_states)
        experts = self._units.experts[handle.tag.layer_idx]
        if experts is None or handle.experts is not None:
            return
        assert topk_ids is not None, "an MoE layer routes"
        assert handle.topk_weights is not None, "an MoE layer weighs"
        handle.routed = run_experts(experts, hidden_states, topk_ids, handle.topk_weights)

    def _post(self, leg: Leg) -> None:
        # A slot that a lost rank blocks is posted by the wait, after its share has moved.
        with contextlib.suppress(PeerLost):
            leg.exchange.post(self._timeout_s)

    def combine(self, handle: DispatchHandle) -> F32:
        """Wait, then add; see MoeTransport.combine.

        Raises:
            IntegrityError: the handle was used before, or is not this transport's.
            XcclTimeout: nobody has served a module for the whole timeout.
            XcclError: a rank refuses what it was asked: it runs another model.
        """
        exchange = _use_up(handle)
        try:
            with self._times.measure(Stage.WAIT):
                self._finish_all(exchange)
            with self._times.measure(Stage.COMBINE):
                return _add_up(exchange)
        finally:
            exchange.release()

    def _finish_all(self, handle: XcclHandle) -> None:
        legs: list[Leg] = [leg for leg in (handle.ffn, handle.experts) if leg is not None]
        for leg in legs:
            self._finish(leg, handle.tag)
        while not all(leg.exchange.is_done() for leg in legs):
            # The answer of one was lost with its rank while the other was waited for.
            for leg in legs:
                self._finish(leg, handle.tag)

    def _finish(self, leg: Leg, tag: StepTag) -> None:
        """Return when the leg is answered, by whomever."""
        deadline_s = SYSTEM_CLOCK.monotonic() + self._timeout_s
        while True:
            left_s = deadline_s - SYSTEM_CLOCK.monotonic()
            try:
                leg.exchange.wait(max(left_s, 0.0))
            except PeerLost as lost:
                if left_s <= 0:
                    raise self._timeout(tag.layer_idx) from lost
                self._move(leg, lost.ranks, tag)
                continue
            if refused := leg.exchange.refused_ranks:
                raise XcclError(f"{tag}: ranks {refused} refuse to compute it", tuple(refused))
            return

    def _move(self, leg: Leg, ranks: Sequence[int], tag: StepTag) -> None:
        """Give the share of lost ranks to others; where there are none yet, wait a little."""
        self._routes.look()
        route = self._routes.route(tag.layer_idx)
        if leg.move(ranks, route, _tag(tag, route)):
            self.num_failovers += 1
            logger.warning("ranks %s are lost; their share of %s moves", list(ranks), tag)
        else:
            time.sleep(RETRY_S)

    def _wait_for_route(self, layer_idx: int) -> Route:
        """The route of a layer once every module of it has somebody to answer."""
        deadline_s = SYSTEM_CLOCK.monotonic() + self._timeout_s
        while True:
            route = self._routes.route(layer_idx)
            if route.is_complete:
                return route
            if SYSTEM_CLOCK.monotonic() > deadline_s:
                raise self._timeout(layer_idx)
            time.sleep(RETRY_S)
            self._routes.look()

    def _timeout(self, layer_idx: int) -> XcclTimeout:
        return XcclTimeout(f"nobody has served layer {layer_idx} for {self._timeout_s:g} s")

    def release(self, handle: DispatchHandle) -> None:
        """Forget an exchange; see MoeTransport.release."""
        _use_up(handle).release()

    def close(self) -> None:
        """Close the port. Idempotent."""
        self._port.close()


def _tag(tag: StepTag, route: Route) -> Tag:
    return Tag(route.epoch, tag.step_idx, tag.layer_idx, tag.microbatch_idx)


def _add_up(handle: XcclHandle) -> F32:
    """[T, H]: shared plus routed, as a colocated layer adds them."""
    shared, routed = handle.shared, handle.routed
    if handle.ffn is not None:
        shared = handle.ffn.rows()
    if handle.experts is not None:
        assert handle.topk_weights is not None, "an MoE layer routes"
        routed = handle.experts.combine(handle.topk_weights)
    if routed is None:
        assert shared is not None, "a layer has a dense FFN or experts"
        return shared if handle.ffn is None else shared.copy()
    return routed if shared is None else shared + routed


def _use_up(handle: DispatchHandle) -> XcclHandle:
    if not isinstance(handle, XcclHandle):
        raise IntegrityError(f"exchange {handle.tag} belongs to another transport")
    if not handle.is_open:
        raise IntegrityError(f"exchange {handle.tag} was already combined or released")
    handle.is_open = False
    return handle
