"""Contract of MoeTransport: what comes back equals the model's own units, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.module_threads import ModuleThreads
from tests.toys import toy_model
from xdeepserve.errors import IntegrityError
from xdeepserve.models.decoder import Model, local_ffn
from xdeepserve.models.moe import FfnCall
from xdeepserve.ops import F32, I32
from xdeepserve.testing.toy_models import pseudo_random
from xdeepserve.transformerless.moe_transport import DispatchHandle, MoeTransport, StepTag

MODELS = ("glm4_moe", "deepseek_v3", "mixtral", "llama")

WORLDS: dict[str, tuple[int, int, int]] = {
    "1F": (1, 0, 0),
    "1E": (0, 1, 0),
    "2F2E": (2, 2, 0),
    "1F3E with replicas": (1, 3, 2),
}
"""Name -> FFN servers, expert servers, redundant experts on each."""


def placement(num_experts: int, num_servers: int, num_replicas: int) -> list[list[int]]:
    """Equal slices, padded, and after each the first experts that follow."""
    if not num_experts or not num_servers:
        return []
    size = -(-num_experts // num_servers)
    rows = []
    for start in range(0, size * num_servers, size):
        own = [e if e < num_experts else -1 for e in range(start, start + size)]
        rows.append(own + [(start + size + i) % num_experts for i in range(num_replicas)])
    return rows


@pytest.fixture(params=WORLDS)
def make_transport(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[Model], MoeTransport]]:
    worlds: list[ModuleThreads] = []

    def make(model: Model) -> MoeTransport:
        num_ffn, num_servers, num_replicas = WORLDS[request.param]
        moe = model.spec.moe
        num_experts = 0 if moe is None else moe.gate.num_experts
        world = ModuleThreads(
            model,
            num_ffn=num_ffn,
            placement=placement(num_experts, num_servers, num_replicas),
        )
        worlds.append(world)
        return world.transport()

    yield make
    for world in worlds:
        world.close()


def make_call(
    model: Model, layer_idx: int, num_tokens: int = 7, *, skipped: float = 0.0
) -> FfnCall:
    """Random hidden states and, on an MoE layer, random routes with at least one slot skipped.

    Args:
        skipped: share of the other slots that are skipped.
    """
    hidden = pseudo_random(f"hidden{layer_idx}", (num_tokens, model.spec.hidden_size))
    moe = model.spec.moe_of(layer_idx)
    if moe is None:
        return FfnCall(layer_idx, hidden, None, None)
    rng = np.random.default_rng(layer_idx)
    ids = np.argsort(rng.random((num_tokens, moe.gate.num_experts)), axis=1)
    topk_ids: I32 = np.ascontiguousarray(ids[:, : moe.gate.top_k], dtype=np.int32)
    topk_ids[num_tokens // 2, 0] = -1
    topk_ids[rng.random(topk_ids.shape) < skipped] = -1
    topk_weights: F32 = rng.random(topk_ids.shape, dtype=np.float32)
    return FfnCall(layer_idx, hidden, topk_ids, topk_weights)


def dispatch(transport: MoeTransport, call: FfnCall, microbatch_idx: int = 0) -> DispatchHandle:
    tag = StepTag(step_idx=5, layer_idx=call.layer_idx, microbatch_idx=microbatch_idx)
    return transport.dispatch(
        tag=tag,
        hidden_states=call.hidden_states,
        topk_ids=call.topk_ids,
        topk_weights=call.topk_weights,
    )


@pytest.mark.parametrize("name", MODELS)
def test_combine_equals_the_models_own_units(
    make_transport: Callable[[Model], MoeTransport], name: str
) -> None:
    model = toy_model(name)
    transport = make_transport(model)
    for layer_idx in range(model.spec.num_layers):
        call = make_call(model, layer_idx)
        got = transport.combine(dispatch(transport, call))
        np.testing.assert_array_equal(got, local_ffn(model, call))


@pytest.mark.parametrize("skipped", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 512])
def test_steps_of_any_size_and_rows_without_experts(
    make_transport: Callable[[Model], MoeTransport], num_tokens: int, skipped: float
) -> None:
    model = toy_model("deepseek_v3", "float32", "cpu", 1)
    transport = make_transport(model)
    for layer_idx in range(model.spec.num_layers):
        call = make_call(model, layer_idx, num_tokens, skipped=skipped)
        got = transport.combine(dispatch(transport, call))
        np.testing.assert_array_equal(got, local_ffn(model, call))


def test_exchanges_may_be_open_together_and_end_in_any_order(
    make_transport: Callable[[Model], MoeTransport],
) -> None:
    model = toy_model("glm4_moe")
    transport = make_transport(model)
    calls = [make_call(model, layer_idx) for layer_idx in range(3)]
    handles = [dispatch(transport, call, idx) for idx, call in enumerate(calls)]
    transport.release(handles[1])
    for idx in (2, 0):
        np.testing.assert_array_equal(transport.combine(handles[idx]), local_ffn(model, calls[idx]))


def test_a_handle_carries_its_tag_and_is_used_once(
    make_transport: Callable[[Model], MoeTransport],
) -> None:
    model = toy_model("glm4_moe")
    transport = make_transport(model)
    handle = dispatch(transport, make_call(model, 1))
    assert handle.tag == StepTag(step_idx=5, layer_idx=1, microbatch_idx=0)
    transport.combine(handle)
    with pytest.raises(IntegrityError, match="already"):
        transport.combine(handle)
    with pytest.raises(IntegrityError, match="already"):
        transport.release(handle)


def test_a_foreign_handle_is_refused(make_transport: Callable[[Model], MoeTransport]) -> None:
    class Foreign:
        tag = StepTag(step_idx=0, layer_idx=1, microbatch_idx=0)

    with pytest.raises(IntegrityError, match="another transport"):
        make_transport(toy_model("glm4_moe")).combine(Foreign())


def test_an_empty_dispatch_gives_an_empty_answer(
    make_transport: Callable[[Model], MoeTransport],
) -> None:
    model = toy_model("glm4_moe")
    transport = make_transport(model)
    hidden = np.zeros((0, model.spec.hidden_size), np.float32)
    call = FfnCall(1, hidden, np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32))
    assert transport.combine(dispatch(transport, call)).shape == hidden.shape


def test_close_is_idempotent(make_transport: Callable[[Model], MoeTransport]) -> None:
    transport = make_transport(toy_model("glm4_moe"))
    transport.close()
    transport.close()
