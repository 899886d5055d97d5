"""AttentionWorker: equals the colocated forward, interleaves microbatches, cleans up."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import pytest

from tests.toys import toy_model
from xdeepserve.errors import IntegrityError
from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.decoder import Model, forward
from xdeepserve.ops import F32, I32, AttentionBatch
from xdeepserve.transformerless.attention_worker import AttentionWorker
from xdeepserve.transformerless.local_transport import LocalTransport
from xdeepserve.transformerless.moe_transport import DispatchHandle, MoeTransport, StepTag
from xdeepserve.transformerless.partition import partition
from xdeepserve.transformerless.stage_times import StageTimes

BLOCK = 4


def prefill(prompts: Sequence[Sequence[int]], first_block: int = 0) -> ForwardBatch:
    """Whole prompts of at most BLOCK tokens; prompt i uses block first_block + i."""
    lens = np.array([len(p) for p in prompts], np.int32)
    start = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    blocks = np.arange(first_block, first_block + len(prompts), dtype=np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lens])
    slots = np.repeat(blocks, lens) * np.int32(BLOCK) + positions
    attention = AttentionBatch(start, lens, blocks[:, None], positions, slots.astype(np.int32))
    return ForwardBatch(
        token_ids=np.frombuffer(array("i", [t for p in prompts for t in p]), np.int32),
        attention=attention,
        logits_rows=start[1:] - np.int32(1),
    )


PROMPTS = ([5, 6, 7], [8], [9, 10, 11, 12], [13, 14])


class LoggingTransport:
    """Passes everything on and writes down what happened; fails on demand."""

    def __init__(self, inner: MoeTransport, *, fail_at: int | None = None) -> None:
        self.log: list[tuple[str, StepTag]] = []
        self.num_open = 0
        self._inner = inner
        self._fail_at = fail_at

    def dispatch(
        self, *, tag: StepTag, hidden_states: F32, topk_ids: I32 | None, topk_weights: F32 | None
    ) -> DispatchHandle:
        self.log.append(("dispatch", tag))
        self.num_open += 1
        return self._inner.dispatch(
            tag=tag, hidden_states=hidden_states, topk_ids=topk_ids, topk_weights=topk_weights
        )

    def combine(self, handle: DispatchHandle) -> F32:
        if self._fail_at == len(self.log):
            self._inner.release(handle)
            self.num_open -= 1
            raise IntegrityError("the experts are gone")
        self.log.append(("combine", handle.tag))
        self.num_open -= 1
        return self._inner.combine(handle)

    def release(self, handle: DispatchHandle) -> None:
        self.num_open -= 1
        self._inner.release(handle)

    def close(self) -> None:
        self._inner.close()


def make_worker(
    model: Model, *, fail_at: int | None = None
) -> tuple[AttentionWorker, LoggingTransport]:
    transport = LoggingTransport(
        LocalTransport(partition(model), stage_times=StageTimes()), fail_at=fail_at
    )
    worker = AttentionWorker(
        side=model.attention_side,
        transport=transport,
        kv_layers=model.new_kv(8, BLOCK),
        stage_times=StageTimes(),
    )
    return worker, transport


@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "llama"])
def test_hidden_states_give_the_logits_of_the_colocated_forward(name: str) -> None:
    model = toy_model(name)
    batch = prefill(PROMPTS)
    (hidden,) = make_worker(model)[0].run([batch], step_idx=0)
    expected = forward(model, batch, model.new_kv(8, BLOCK))
    np.testing.assert_array_equal(model.head(hidden, batch.logits_rows), expected)


def test_microbatches_give_the_bits_of_one_batch() -> None:
    model = toy_model("glm4_moe")
    (together,) = make_worker(model)[0].run([prefill(PROMPTS)], step_idx=0)
    parts = [prefill(PROMPTS[:1]), prefill(PROMPTS[1:3], 1), prefill(PROMPTS[3:], 3)]
    split = make_worker(model)[0].run(parts, step_idx=0)
    np.testing.assert_array_equal(np.concatenate(split), together)


def test_microbatches_are_interleaved_layer_by_layer() -> None:
    model = toy_model("glm4_moe")
    worker, transport = make_worker(model)
    worker.run([prefill(PROMPTS[:2]), prefill(PROMPTS[2:], 2)], step_idx=4)
    steps = [(verb, tag.layer_idx, tag.microbatch_idx) for verb, tag in transport.log]
    assert steps[:6] == [
        ("dispatch", 0, 0),
        ("dispatch", 0, 1),
        ("combine", 0, 0),
        ("dispatch", 1, 0),
        ("combine", 0, 1),
        ("dispatch", 1, 1),
    ]
    assert len(steps) == 2 * 2 * model.spec.num_layers
    assert {tag.step_idx for _, tag in transport.log} == {4}
    assert transport.num_open == 0


def test_a_failed_exchange_releases_the_others() -> None:
    worker, transport = make_worker(toy_model("glm4_moe"), fail_at=4)
    with pytest.raises(IntegrityError, match="gone"):
        worker.run([prefill(PROMPTS[:2]), prefill(PROMPTS[2:], 2)], step_idx=0)
    assert transport.num_open == 0


def test_partition_hands_out_every_unit_by_role() -> None:
    model = toy_model("glm4_moe")
    units = partition(model)
    assert units.attention.embedding is model.embedding
    assert [u is None for u in units.experts] == [True, False, False]
    assert all(u is not None for u in units.ffn)
    assert len(units.attention.layers) == model.spec.num_layers
