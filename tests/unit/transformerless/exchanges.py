"""What tests of the transport do with a world of module servers."""

from __future__ import annotations

import numpy as np

from tests.module_threads import ModuleThreads
from xdeepserve.models.moe import FfnCall
from xdeepserve.ops import F32
from xdeepserve.testing.toy_models import pseudo_random
from xdeepserve.transformerless.moe_transport import StepTag
from xdeepserve.transformerless.xccl_handle import XcclHandle
from xdeepserve.transformerless.xccl_transport import XcclTransport
from xdeepserve.xccl import Port

HALVES = ((0, 1, 2, 3), (4, 5, 6, 7))
MOE_LAYER = 1


def make_call(world: ModuleThreads, num_tokens: int = 9) -> FfnCall:
    moe = world.model.spec.moe
    assert moe is not None
    hidden = pseudo_random("hidden", (num_tokens, world.model.spec.hidden_size))
    rng = np.random.default_rng(3)
    ids = np.argsort(rng.random((num_tokens, moe.gate.num_experts)), axis=1)
    topk_ids = np.ascontiguousarray(ids[:, : moe.gate.top_k], np.int32)
    return FfnCall(MOE_LAYER, hidden, topk_ids, rng.random(topk_ids.shape, np.float32))


def dispatch(transport: XcclTransport, call: FfnCall, step_idx: int = 0) -> XcclHandle:
    return transport.dispatch(
        tag=StepTag(step_idx, call.layer_idx, 0),
        hidden_states=call.hidden_states,
        topk_ids=call.topk_ids,
        topk_weights=call.topk_weights,
    )


def exchange(transport: XcclTransport, call: FfnCall) -> F32:
    return transport.combine(dispatch(transport, call))


def stop(world: ModuleThreads, rank: int) -> None:
    """End a server; returns when its segment is closed."""
    server = world.servers[rank]
    server.stop()
    for thread in world.threads_of(rank):
        thread.join(10.0)


def num_served(world: ModuleThreads, rank: int) -> int:
    """Requests that a server has answered by its end."""
    stop(world, rank)
    return world.servers[rank].num_requests


def silence(world: ModuleThreads, transport: XcclTransport, *ranks: int) -> list[Port]:
    """Lives of these ranks that are linked and never answer."""
    lives = []
    for rank in ranks:
        stop(world, rank)
        lives.append(world.port(rank))
    transport._port.discover()
    for life in lives:
        life.wait_linked([0], timeout_s=5.0)
    return lives
