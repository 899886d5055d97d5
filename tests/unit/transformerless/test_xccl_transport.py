"""XcclTransport and ModuleServer: exchanges survive lost and replaced ranks, bit for bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from tests.module_threads import FIRST_EXPERT, FIRST_FFN, ModuleThreads
from tests.toys import toy_model
from tests.unit.transformerless.exchanges import (
    dispatch,
    exchange,
    make_call,
    num_served,
    silence,
    stop,
)
from xdeepserve.errors import XcclError
from xdeepserve.models.decoder import local_ffn
from xdeepserve.models.units import ExpertUnit
from xdeepserve.ops import F32, Array, Ops
from xdeepserve.transformerless.expert_share import ExpertShare
from xdeepserve.transformerless.module_server import ModuleServer
from xdeepserve.transformerless.moe_transport import StepTag
from xdeepserve.transformerless.partition import Partition
from xdeepserve.transformerless.route_keeper import RouteKeeper
from xdeepserve.transformerless.stage_times import Stage, StageTimes


def test_the_share_of_a_lost_rank_goes_to_another(world: ModuleThreads) -> None:
    transport, call = world.transport(), make_call(world)
    expected = local_ffn(world.model, call)
    np.testing.assert_array_equal(exchange(transport, call), expected)
    stop(world, FIRST_EXPERT)
    np.testing.assert_array_equal(exchange(transport, call), expected)
    transport.close()
    assert num_served(world, FIRST_EXPERT + 1) == 3


def test_an_exchange_under_way_moves_when_its_rank_dies(world: ModuleThreads) -> None:
    transport, call = world.transport(), make_call(world)
    exchange(transport, call)
    # So that the request lies with it when it ends.
    (silent,) = silence(world, transport, FIRST_EXPERT + 1)
    handle = dispatch(transport, call)
    closing = threading.Timer(0.05, silent.close)
    closing.start()
    np.testing.assert_array_equal(transport.combine(handle), local_ffn(world.model, call))
    assert transport.num_failovers >= 1
    transport.close()


def test_what_nobody_serves_is_computed_by_the_asker_until_somebody_does() -> None:
    world = ModuleThreads(toy_model("glm4_moe"), num_ffn=1, placement=[range(8)])
    transport, call = world.transport(), make_call(world)
    expected = local_ffn(world.model, call)
    assert transport.wait_complete(timeout_s=0.0)
    for rank in (FIRST_EXPERT, FIRST_FFN):
        stop(world, rank)
        for _ in range(2):
            np.testing.assert_array_equal(exchange(transport, call), expected)
    assert not transport.wait_complete(timeout_s=0.0)
    assert transport.num_fallbacks in (1, 2), "a loss is found once, then nobody is asked"
    for rank in (FIRST_EXPERT, FIRST_FFN):
        world.start_server(rank)
    assert transport.wait_complete(timeout_s=10.0)
    np.testing.assert_array_equal(exchange(transport, call), expected)
    transport.close()
    assert [num_served(world, rank) for rank in (FIRST_EXPERT, FIRST_FFN)] == [1, 1]
    world.close()


def test_a_rank_that_lives_but_does_not_answer_is_given_up(world: ModuleThreads) -> None:
    transport, call = world.transport(timeout_s=0.05), make_call(world)
    silence(world, transport, FIRST_EXPERT)
    expected = local_ffn(world.model, call)
    for _ in range(3):
        np.testing.assert_array_equal(exchange(transport, call), expected)
    assert (transport.num_failovers, transport.num_fallbacks) == (0, 1), "it is not asked again"
    assert transport.num_exchanges == 3
    transport.close()


class HangingUnits:
    """Expert units of a server whose loop hangs in its computations, until released."""

    def __init__(self, units: Partition) -> None:
        self.hangs, self.released = threading.Event(), threading.Event()
        self.partition = replace(units, experts=tuple(map(self._wrap, units.experts)))

    def _wrap(self, unit: ExpertUnit | None) -> ExpertUnit | None:
        return None if unit is None else replace(unit, ops=HangingOps(unit.ops, self))


class HangingOps:
    """Operators whose expert computation does not return before it is released."""

    def __init__(self, ops: Ops, units: HangingUnits) -> None:
        self._ops = ops
        self._units = units

    def __getattr__(self, name: str) -> object:
        return getattr(self._ops, name)

    def expert_mlp(self, *args: object) -> F32:
        self._units.hangs.set()
        assert self._units.released.wait(30.0)
        return self._ops.expert_mlp(*args)  # type: ignore[arg-type]


@contextmanager
def beating_server(world: ModuleThreads, units: HangingUnits) -> Iterator[ModuleServer]:
    """The first expert server: its process shows life, its loop is stuck after 50 ms."""
    stop(world, FIRST_EXPERT)
    port, is_over = world.port(FIRST_EXPERT), threading.Event()
    server = ModuleServer(port, units.partition, stage_times=StageTimes(), stuck_after_s=0.05)

    def beat() -> None:
        while not is_over.wait(0.01):
            server.beat()

    threads = [threading.Thread(target=server.run), threading.Thread(target=beat)]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        units.released.set()
        server.stop()
        is_over.set()
        for thread in threads:
            thread.join()


def test_a_loop_that_hangs_in_a_process_that_lives_is_gone_round(world: ModuleThreads) -> None:
    units = HangingUnits(world.units)
    with beating_server(world, units):
        transport, call = world.transport(frozen_after_s=0.2), make_call(world)
        np.testing.assert_array_equal(exchange(transport, call), local_ffn(world.model, call))
        assert units.hangs.is_set()
        assert (transport.num_failovers, transport.num_fallbacks) == (1, 0)
        transport.close()


def test_a_round_that_stood_still_does_not_excuse_the_next_one(world: ModuleThreads) -> None:
    units = HangingUnits(world.units)
    with beating_server(world, units) as server:
        # Below ten times the halt: by then a loop that hangs must be gone round.
        transport, call = world.transport(frozen_after_s=0.2, timeout_s=4.0), make_call(world)
        expected = local_ffn(world.model, call)
        np.testing.assert_array_equal(exchange(transport, call), expected)
        time.sleep(0.5)
        units.released.set()
        while server.num_requests == 0:
            time.sleep(0.001)
        units.released.clear()
        units.hangs.clear()
        while not units.hangs.is_set():
            np.testing.assert_array_equal(exchange(transport, call), expected)
        assert transport.num_failovers >= 2
        assert transport.num_fallbacks == 0
        transport.close()


def test_the_asker_computes_some_experts_while_it_would_wait(world: ModuleThreads) -> None:
    call = make_call(world, num_tokens=40)
    share = ExpertShare()
    transport = world.transport(share=share)
    for _ in range(20):
        share.learn(40, was_ready=False)
    num_requests = sum(server.num_requests for server in world.servers.values())
    handle = dispatch(transport, call)
    assert handle.own_experts is not None
    others = handle.own_experts.others_ids
    assert 0 < np.count_nonzero(others < 0) < call.topk_ids.size / 2
    np.testing.assert_array_equal(transport.combine(handle), local_ffn(world.model, call))
    assert sum(server.num_requests for server in world.servers.values()) > num_requests
    transport.close()


def test_own_experts_survive_the_loss_of_the_others(world: ModuleThreads) -> None:
    call = make_call(world, num_tokens=40)
    share = ExpertShare()
    for _ in range(40):
        share.learn(40, was_ready=False)
    transport = world.transport(share=share)
    handle = dispatch(transport, call)
    for rank in (FIRST_EXPERT, FIRST_EXPERT + 1):
        stop(world, rank)
    np.testing.assert_array_equal(transport.combine(handle), local_ffn(world.model, call))
    np.testing.assert_array_equal(exchange(transport, call), local_ffn(world.model, call))
    transport.close()


def test_a_share_moves_by_the_table_in_force_even_if_it_has_fewer_replicas() -> None:
    replicated = ((0, 1, 2, 3, 4, 5, 6, 7), (4, 5, 6, 7, 0, 1, 2, 3))
    world = ModuleThreads(toy_model("glm4_moe"), placement=replicated)
    transport, call = world.transport(), make_call(world)
    exchange(transport, call)
    (silent,) = silence(world, transport, FIRST_EXPERT + 1)
    transport._routes.look()
    handle = dispatch(transport, call)
    world.routing.swap(world.table(placement=[range(8)], epoch=1))
    transport._routes.table()
    silent.close()
    np.testing.assert_array_equal(transport.combine(handle), local_ffn(world.model, call))
    assert (transport.num_failovers, transport.num_fallbacks) == (1, 0)
    transport.close()
    world.close()


def test_a_new_table_is_used_from_the_next_dispatch_on(world: ModuleThreads) -> None:
    transport, call = world.transport(), make_call(world)
    expected = local_ffn(world.model, call)
    before = dispatch(transport, call)
    world.routing.swap(world.table(num_ffn=0, placement=[range(8)], epoch=1))
    after = dispatch(transport, call)
    np.testing.assert_array_equal(transport.combine(before), expected)
    np.testing.assert_array_equal(transport.combine(after), expected)
    transport.close()
    ranks = (FIRST_FFN, FIRST_EXPERT, FIRST_EXPERT + 1)
    assert [num_served(world, rank) for rank in ranks] == [1, 2, 1]


def test_ffn_ranks_take_turns_by_group_step_layer_and_microbatch() -> None:
    world = ModuleThreads(toy_model("glm4_moe"), num_ffn=2, placement=[range(8)])
    ports = [world.port(rank) for rank in (0, 1)]
    for port in ports:
        port.wait_linked([FIRST_FFN, FIRST_FFN + 1, FIRST_EXPERT], timeout_s=10.0)
    keepers = [RouteKeeper(port, world.routing) for port in ports]
    tags = [StepTag(2, 1, 0), StepTag(3, 1, 0), StepTag(3, 2, 0), StepTag(3, 2, 1)]
    ranks = [[keeper.route(tag).ffn_rank - FIRST_FFN for tag in tags] for keeper in keepers]
    assert ranks == [[1, 0, 1, 0], [0, 1, 0, 1]]
    stop(world, FIRST_FFN)
    for keeper in keepers:
        keeper.look()
        assert {keeper.route(tag).ffn_rank for tag in tags} == {FIRST_FFN + 1}
    world.close()


def test_a_server_of_another_model_refuses(world: ModuleThreads) -> None:
    other = ModuleThreads(toy_model("llama"))
    rank = FIRST_EXPERT
    stop(world, rank)
    world.servers[rank] = ModuleServer(world.port(rank), other.units, stage_times=StageTimes())
    thread = threading.Thread(target=world.servers[rank].run)
    thread.start()
    world.routing.swap(world.table(placement=[range(8)], epoch=1))
    with pytest.raises(XcclError, match="refuse to compute"):
        exchange(world.transport(), make_call(world))
    world.servers[rank].stop()
    thread.join()


class WatchedOps:
    """Operators that note where the MLPs of a server write: in `places`, None = to a new array."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.places: list[F32 | None] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._ops, name)

    def swiglu_mlp(self, *args: object) -> F32:
        self.places.append(args[-1])  # type: ignore[arg-type]
        return self._ops.swiglu_mlp(*args)  # type: ignore[arg-type]

    def expert_mlp(self, *args: object) -> F32:
        self.places.append(args[-1])  # type: ignore[arg-type]
        return self._ops.expert_mlp(*args)  # type: ignore[arg-type]


def watched_server(world: ModuleThreads, rank: int) -> tuple[WatchedOps, Array]:
    """A new life of a server: its operators, and the memory of its segment."""
    stop(world, rank)
    ops, units = WatchedOps(world.model.ops), world.units
    world.units = replace(
        units,
        ffn=tuple(unit and replace(unit, ops=ops) for unit in units.ffn),
        experts=tuple(unit and replace(unit, ops=ops) for unit in units.experts),
    )
    world.start_server(rank)
    world.units = units
    return ops, world.servers[rank]._port.own_bytes()


def test_what_one_asker_wants_is_computed_where_it_reads_it() -> None:
    world = ModuleThreads(toy_model("glm4_moe"), num_ffn=1, placement=[range(8)])
    watched = [watched_server(world, rank) for rank in (FIRST_FFN, FIRST_EXPERT)]
    transport, call = world.transport(), make_call(world)
    np.testing.assert_array_equal(exchange(transport, call), local_ffn(world.model, call))
    for ops, memory in watched:
        (place,) = ops.places
        assert place is not None
        assert np.may_share_memory(place, memory)
    transport.close()
    world.close()


def test_instances_of_an_expert_are_computed_together_and_answered_in_their_order() -> None:
    replicated = ((0, 1, 2, 3, 4, 5, 6, 7), (4, 5, 6, 7, 0, 1, 2, 3))
    world = ModuleThreads(toy_model("glm4_moe"), placement=replicated)
    transport, call = world.transport(), make_call(world)
    stop(world, FIRST_EXPERT + 1)
    ops, _ = watched_server(world, FIRST_EXPERT)
    while not ops.places:  # until the new life is found
        np.testing.assert_array_equal(exchange(transport, call), local_ffn(world.model, call))
    assert ops.places[0] is None, "rows in another order are scattered to their places"
    transport.close()
    world.close()


def test_a_round_serves_all_askers_and_answers_each_with_its_own_rows() -> None:
    world = ModuleThreads(toy_model("glm4_moe"), placement=[range(8)])
    stop(world, FIRST_EXPERT)
    times = StageTimes()
    port = world.port(FIRST_EXPERT)
    server = ModuleServer(port, world.units, stage_times=times)
    are_linked = threading.Event()

    def link() -> None:
        while not are_linked.wait(0.001):
            port.discover_news()

    linking = threading.Thread(target=link)
    linking.start()
    transports = [world.transport(rank) for rank in range(3)]
    calls = [make_call(world, num_tokens) for num_tokens in (9, 4, 1)]
    are_linked.set()
    linking.join()
    handles = [dispatch(t, call) for t, call in zip(transports, calls, strict=True)]
    assert server.serve_once(1.0) == 3
    assert times.counts()[Stage.EXPERT] == 1
    for transport, handle, call in zip(transports, handles, calls, strict=True):
        np.testing.assert_array_equal(transport.combine(handle), local_ffn(world.model, call))
        transport.close()
    world.close()
