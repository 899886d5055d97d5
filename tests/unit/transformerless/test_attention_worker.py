"""AttentionWorker: equals the colocated stack, interleaves microbatches, cleans up."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from tests.toys import toy_model
from xdeepserve.errors import IntegrityError
from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.decoder import Model, local_ffn
from xdeepserve.models.moe import FfnCall
from xdeepserve.ops import F32, I32, AttentionBatch
from xdeepserve.transformerless.attention_worker import AttentionWorker
from xdeepserve.transformerless.moe_transport import DispatchHandle, StepTag, use_up
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


@dataclass
class LoggedHandle:
    tag: StepTag
    call: FfnCall
    is_open: bool = True


class LoggingTransport:
    """Computes by the model itself and writes down what happened; fails on demand."""

    def __init__(self, model: Model, *, fail_at: int | None = None) -> None:
        self.log: list[tuple[str, StepTag]] = []
        self.num_open = 0
        self._model = model
        self._fail_at = fail_at

    def dispatch(
        self, *, tag: StepTag, hidden_states: F32, topk_ids: I32 | None, topk_weights: F32 | None
    ) -> LoggedHandle:
        self.log.append(("dispatch", tag))
        self.num_open += 1
        return LoggedHandle(tag, FfnCall(tag.layer_idx, hidden_states, topk_ids, topk_weights))

    def combine(self, handle: DispatchHandle) -> F32:
        self.num_open -= 1
        call = use_up(handle, LoggedHandle).call
        if self._fail_at == len(self.log):
            raise IntegrityError("the experts are gone")
        self.log.append(("combine", handle.tag))
        return local_ffn(self._model, call)

    def release(self, handle: DispatchHandle) -> None:
        self.num_open -= 1
        use_up(handle, LoggedHandle)

    def close(self) -> None:
        """Nothing to free."""


def make_worker(
    model: Model, *, fail_at: int | None = None
) -> tuple[AttentionWorker, LoggingTransport]:
    transport = LoggingTransport(model, fail_at=fail_at)
    worker = AttentionWorker(
        side=model.attention_side,
        transport=transport,
        kv_layers=model.new_kv(8, BLOCK),
        stage_times=StageTimes(),
    )
    return worker, transport


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["glm4_moe", "deepseek_v3", "llama"])
def test_hidden_states_are_those_of_the_colocated_stack(name: str, backend: str) -> None:
    model = toy_model(name, "float32", backend)
    batch = prefill(PROMPTS)
    (hidden,) = make_worker(model)[0].run([batch], step_idx=0)
    embedded, kv = model.embedding(batch.token_ids), model.new_kv(8, BLOCK)
    expected = model.ops.decoder_layers(model.stack, embedded, batch.attention, kv)
    np.testing.assert_array_equal(hidden, expected)


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
