"""AttentionWorker: drives a step that is taken apart, one generator per microbatch.

    microbatch 0: attention 0 | dispatch ........ combine | attention 1 | dispatch ...
    microbatch 1:             | attention 0 | dispatch ........ combine | attention 1 ...

Each microbatch is a state machine of its own (layer, stage): while one is at the experts, another
computes attention. Nothing here knows how far away the experts are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence

from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.decoder import AttentionSide, layer_steps
from xdeepserve.models.moe import FfnCall
from xdeepserve.ops import F32, KVLayer
from xdeepserve.transformerless.moe_transport import DispatchHandle, MoeTransport, StepTag
from xdeepserve.transformerless.stage_times import Stage, StageTimes


class _Microbatch:
    """One generator of the layer loop and its exchange under way."""

    __slots__ = ("handle", "idx", "steps")

    def __init__(self, idx: int, steps: Generator[FfnCall, F32, F32]) -> None:
        self.idx = idx
        self.steps = steps
        self.handle: DispatchHandle | None = None


class AttentionWorker:
    """Runs steps over its KV arrays and a transport. Thread: the step loop."""

    def __init__(
        self,
        *,
        side: AttentionSide,
        transport: MoeTransport,
        kv_layers: Sequence[KVLayer],
        stage_times: StageTimes,
    ) -> None:
        self._times = stage_times
        self._side = side
        self._transport = transport
        self._kv_layers = kv_layers

    def run(self, microbatches: Sequence[ForwardBatch], *, step_idx: int) -> list[F32]:
        """Compute all layers for every microbatch, interleaved.

        Args:
            microbatches: disjoint parts of one step; their sequences share no KV being written.
            step_idx: tags the exchanges.

        Returns:
            Hidden states [T, H] per microbatch, before the final norm.
        """
        hidden_states: list[F32 | None] = [None] * len(microbatches)
        in_flight = deque(
            _Microbatch(idx, layer_steps(self._side, batch, self._kv_layers))
            for idx, batch in enumerate(microbatches)
        )
        try:
            for microbatch in in_flight:
                with self._times.measure(Stage.ATTENTION):
                    call = next(microbatch.steps)
                self._dispatch(microbatch, call, step_idx)
            while in_flight:
                microbatch = in_flight[0]
                hidden_states[microbatch.idx] = self._advance(microbatch, step_idx)
                in_flight.popleft()
                if hidden_states[microbatch.idx] is None:
                    in_flight.append(microbatch)
        finally:
            self._release(in_flight)
        return [rows for rows in hidden_states if rows is not None]

    def _advance(self, microbatch: _Microbatch, step_idx: int) -> F32 | None:
        """Combine, then attention of the next layer; the hidden states after the last."""
        handle, microbatch.handle = microbatch.handle, None
        assert handle is not None, "a microbatch in flight has an exchange under way"
        ffn_output = self._transport.combine(handle)
        try:
            with self._times.measure(Stage.ATTENTION):
                call = microbatch.steps.send(ffn_output)
        except StopIteration as finished:
            final: F32 = finished.value
            return final
        self._dispatch(microbatch, call, step_idx)
        return None

    def _dispatch(self, microbatch: _Microbatch, call: FfnCall, step_idx: int) -> None:
        tag = StepTag(step_idx, call.layer_idx, microbatch.idx)
        microbatch.handle = self._transport.dispatch(
            tag=tag,
            hidden_states=call.hidden_states,
            topk_ids=call.topk_ids,
            topk_weights=call.topk_weights,
        )

    def _release(self, in_flight: deque[_Microbatch]) -> None:
        """After a failure: give up the exchanges that nobody will combine."""
        for microbatch in in_flight:
            microbatch.steps.close()
            if microbatch.handle is not None:
                self._transport.release(microbatch.handle)
