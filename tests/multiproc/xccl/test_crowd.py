"""More ranks than cores, random delays, and every mode of exchange between real processes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.multiproc.xccl.processes import Run
from tests.multiproc.xccl.test_kill import (
    join_again,
    receive_stream,
    send_stream,
    serve_until_ended,
)
from tests.multiproc.xccl.workers import STOP, WAIT_S, layer_by_hand
from xdeepserve.xccl import FORWARD, Port, Tag

HIDDEN = 16
EXPERTS = 6


def stop(port: Port, *ranks: int) -> None:
    with port.exchange(np.zeros((1, HIDDEN), np.float32)) as exchange:
        for rank in ranks:
            exchange.add(rank, tag=Tag(9, 0, 0, 0), kind=STOP)
        exchange.wait(WAIT_S)


@pytest.mark.parametrize("delays", [False, True])
def test_six_ranks_on_few_cores(run: Run, delays: bool) -> None:
    """Five askers and one server: more spinning ranks than cores, and all get through."""
    port = run.port(0)
    extra = {"fault": "delays"} if delays else {}
    askers = [run.start("asker", rank=r, count=150, depth=1 + r % 3, **extra) for r in range(1, 6)]
    port.wait_linked(range(1, 6), WAIT_S)
    serve_until_ended(port, *askers)
    assert [asker.result() for asker in askers] == [{"checked": 150}] * 5
    assert port.num_open_requests == 0


def test_a_stream_with_random_delays_on_both_sides(run: Run) -> None:
    port = run.port(0)
    sender = run.start("sender", rank=1, count=600, fault="delays")
    port.wait_linked([1], WAIT_S)
    receive_stream(port, 600)
    assert sender.result() == {"sent": 600}
    receiver = join_again(port, run, "receiver", count=600, fault="delays")
    send_stream(port, 600)
    assert receiver.result() == {"received": 600}


@pytest.mark.parametrize("delays", [False, True])
def test_ep_group_of_four(run: Run, delays: bool) -> None:
    extra = {"fault": "delays"} if delays else {}
    ranks = [0, 1, 2, 3]
    members = [
        run.start("ep_rank", rank=rank, peers=ranks, ranks=ranks, steps=40, **extra)
        for rank in ranks
    ]
    assert [member.result() for member in members] == [{"steps": 40}] * 4


@pytest.mark.parametrize("through", ["direct", "trampoline"])
def test_two_askers_worth_of_microbatches_and_three_experts(run: Run, through: str) -> None:
    """Two exchanges under way at a time; combined results equal the layer computed by hand."""
    port = run.port(0)
    owners = np.array([1, 1, 2, 2, 3, 3], np.int32)
    experts = [
        run.start(
            "expert", rank=rank, peers=[0, 1, 2, 3], owners=owners.tolist(), hidden_size=HIDDEN
        )
        for rank in (1, 2, 3)
    ]
    port.wait_linked([1, 2, 3], WAIT_S)
    seen_by_asker = owners if through == "direct" else np.full(EXPERTS, 2, np.int32)
    rng = np.random.default_rng(5)
    for step_idx in range(20):
        under_way = []
        for microbatch_idx in range(2):
            hidden = rng.standard_normal((7, HIDDEN), dtype=np.float32)
            ids = rng.integers(-1, EXPERTS, (7, 3)).astype(np.int32)
            weights = rng.random((7, 3), dtype=np.float32)
            exchange = port.a2e(
                tag=Tag(1, step_idx, 4, microbatch_idx),
                hidden_states=hidden,
                topk_ids=ids,
                expert_rank=seen_by_asker,
                kind=0 if through == "direct" else FORWARD,
            )
            under_way.append((exchange, hidden, ids, weights))
        for exchange, hidden, ids, weights in under_way:
            got = exchange.e2a(weights, hidden_size=HIDDEN, timeout_s=WAIT_S)
            assert np.array_equal(got, layer_by_hand(hidden, ids, weights))
            exchange.release()
    stop(port, 1, 2, 3)
    for expert in experts:
        assert expert.end()[0] == 0
