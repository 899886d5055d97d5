"""LocalTransport: the MoE transport whose network is a function call (colocated experts)."""

from __future__ import annotations

from xdeepserve.models.moe import FfnCall, run_ffn
from xdeepserve.ops import F32, I32
from xdeepserve.transformerless.moe_transport import DispatchHandle, StepTag, use_up
from xdeepserve.transformerless.partition import Partition
from xdeepserve.transformerless.stage_times import Stage, StageTimes


class LocalHandle:
    """An exchange that waits to be computed by `combine`."""

    __slots__ = ("call", "is_open", "tag")

    def __init__(self, tag: StepTag, call: FfnCall) -> None:
        self.tag = tag
        self.call = call
        self.is_open = True


class LocalTransport:
    """MoeTransport over units of this process. Holds no state between exchanges."""

    def __init__(self, units: Partition, *, stage_times: StageTimes) -> None:
        self._times = stage_times
        self._ffn = units.ffn
        self._experts = units.experts

    def dispatch(
        self, *, tag: StepTag, hidden_states: F32, topk_ids: I32 | None, topk_weights: F32 | None
    ) -> LocalHandle:
        """Open an exchange; see MoeTransport.dispatch."""
        return LocalHandle(tag, FfnCall(tag.layer_idx, hidden_states, topk_ids, topk_weights))

    def combine(self, handle: DispatchHandle) -> F32:
        """Compute the exchange; see MoeTransport.combine.

        Raises:
            IntegrityError: the handle was used before, or is not this transport's.
        """
        call = use_up(handle, LocalHandle).call
        with self._times.measure(Stage.OWN_MODULES):
            return run_ffn(self._ffn[call.layer_idx], self._experts[call.layer_idx], call)

    def release(self, handle: DispatchHandle) -> None:
        """Forget an exchange; see MoeTransport.release."""
        use_up(handle, LocalHandle)

    def close(self) -> None:
        """Nothing to free."""
