"""Exchanges end in time, give back what they took, and spread over replicas."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.module_threads import FIRST_EXPERT, FIRST_FFN, ModuleThreads
from tests.toys import toy_model
from tests.unit.transformerless.exchanges import (
    HALVES,
    dispatch,
    exchange,
    make_call,
    num_served,
    silence,
)
from xdeepserve.clock import SystemClock
from xdeepserve.models.decoder import local_ffn
from xdeepserve.xccl import PeerState


class SetClock(SystemClock):
    """Stands still until it is set."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


def test_an_exchange_has_one_deadline_for_both_legs(world: ModuleThreads) -> None:
    clock, call = SetClock(), make_call(world)
    transport = world.transport(timeout_s=20.0, clock=clock)
    silence(world, transport, FIRST_FFN, FIRST_EXPERT, FIRST_EXPERT + 1)
    handle = dispatch(transport, call)
    assert handle.ffn is not None
    assert handle.experts is not None
    clock.now_s = 20.0
    # A leg that were waited for beyond the deadline would get its answer from the next life.
    lives = [threading.Timer(2.0, world.start_server, [rank]) for rank in (FIRST_FFN, FIRST_EXPERT)]
    for life in lives:
        life.start()
    np.testing.assert_array_equal(transport.combine(handle), local_ffn(world.model, call))
    for life in lives:
        life.cancel()
        life.join()
    assert (transport.num_failovers, transport.num_fallbacks) == (0, 2)
    transport.close()


def test_a_move_does_not_extend_the_deadline() -> None:
    world = ModuleThreads(toy_model("glm4_moe"), placement=HALVES)
    clock, call = SetClock(), make_call(world)
    transport = world.transport(timeout_s=20.0, clock=clock)
    first, second = silence(world, transport, FIRST_EXPERT, FIRST_EXPERT + 1)
    handle = dispatch(transport, call)
    first.close()
    assert transport._port.status_of(FIRST_EXPERT).state is PeerState.DEAD
    clock.now_s = 20.0
    end = threading.Timer(2.0, second.close)
    end.start()
    np.testing.assert_array_equal(transport.combine(handle), local_ffn(world.model, call))
    end.cancel()
    end.join()
    assert (transport.num_failovers, transport.num_fallbacks) == (1, 1)
    assert transport._port.status_of(FIRST_EXPERT + 1).state is PeerState.ALIVE
    transport.close()
    world.close()


def test_a_dispatch_that_fails_gives_its_ffn_leg_back(world: ModuleThreads) -> None:
    transport, call = world.transport(timeout_s=5.0), make_call(world)
    assert call.topk_ids is not None
    unroutable = replace(call, topk_ids=np.full_like(call.topk_ids, 99))
    failures = []  # their tracebacks keep the handles
    for step_idx in range(2 * transport._port.layout.row_slots):
        with pytest.raises(ValueError, match="expert") as caught:
            dispatch(transport, unroutable, step_idx)
        failures.append(caught)
    np.testing.assert_array_equal(exchange(transport, call), local_ffn(world.model, call))
    assert transport.num_fallbacks == 0
    transport.close()


def test_a_group_of_one_row_asks_every_replica_in_turn() -> None:
    world = ModuleThreads(toy_model("glm4_moe"), placement=[range(8), range(8)])
    transport, call = world.transport(), make_call(world, num_tokens=1)
    expected = local_ffn(world.model, call)
    for step_idx in range(6):
        handle = dispatch(transport, call, step_idx)
        np.testing.assert_array_equal(transport.combine(handle), expected)
    transport.close()
    assert [num_served(world, rank) for rank in (FIRST_EXPERT, FIRST_EXPERT + 1)] == [3, 3]
    world.close()
