"""XcclHandle: an exchange under way over XCCL: its legs, and what is computed here."""

from __future__ import annotations

from xdeepserve.models.units import ExpertUnit
from xdeepserve.ops import F32, I32
from xdeepserve.transformerless.legs import ExpertLeg, FfnLeg, is_answered
from xdeepserve.transformerless.moe_transport import StepTag
from xdeepserve.transformerless.own_experts import OwnExperts


class XcclHandle:
    """An exchange under way: what was asked of others until when, and what was computed here."""

    __slots__ = (
        "deadline_s",
        "experts",
        "ffn",
        "hidden_states",
        "is_open",
        "own_experts",
        "routed",
        "shared",
        "tag",
        "topk_ids",
        "topk_weights",
    )

    def __init__(
        self,
        tag: StepTag,
        hidden_states: F32,
        topk_ids: I32 | None,
        topk_weights: F32 | None,
        deadline_s: float,
    ) -> None:
        self.tag = tag
        self.hidden_states = hidden_states
        self.topk_ids = topk_ids
        self.topk_weights = topk_weights
        self.deadline_s = deadline_s
        self.ffn: FfnLeg | None = None
        self.experts: ExpertLeg | None = None
        self.own_experts: OwnExperts | None = None
        self.shared: F32 | None = None
        self.routed: F32 | None = None
        self.is_open = True

    def is_answered(self) -> bool:
        """Whether what was asked of others is there."""
        return all(is_answered(leg) for leg in (self.ffn, self.experts) if leg is not None)

    def give_up_ffn(self) -> None:
        """Forget the FFN leg."""
        if self.ffn is not None:
            self.ffn.exchange.release()
        self.ffn = None

    def give_up_experts(self) -> None:
        """Forget the expert leg."""
        if self.experts is not None:
            self.experts.exchange.release()
        self.experts = None

    def release(self) -> None:
        """Free the slots of both legs."""
        self.give_up_ffn()
        self.give_up_experts()

    def add_up(self, experts: ExpertUnit | None) -> F32:
        """[T, H]: shared plus routed, as a colocated layer adds them; experts: of the layer."""
        shared, routed = self.shared, self.routed
        if self.ffn is not None:
            shared = self.ffn.rows()
        if self.experts is not None:
            routed = self._routed(self.experts, experts)
        if routed is None:
            assert shared is not None, "a layer has a dense FFN or experts"
            return shared if self.ffn is None else shared.copy()
        return routed if shared is None else shared + routed

    def _routed(self, leg: ExpertLeg, experts: ExpertUnit | None) -> F32:
        assert self.topk_weights is not None, "an MoE layer weighs"
        if self.own_experts is None:
            return leg.combine(self.topk_weights)
        assert experts is not None, "experts computed here are of this layer"
        return self.own_experts.combine(leg, experts, self.topk_weights)
