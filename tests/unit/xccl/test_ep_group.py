"""An EP group's verbs on ports of one process: early steps, left epochs, answers in one call."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.xccl.ports import SOON_S, Ranks, expert_output, moe_by_hand, rows_of
from xdeepserve.errors import PeerLost, XcclTimeout
from xdeepserve.xccl import Batch, EpGroup, Exchange, Port, Tag

IDS = np.array([[0, 3], [2, -1], [1, 2]], np.int32)
OWNERS = np.array([0, 0, 1, 1], np.int32)
WEIGHTS = np.array([[0.5, 0.25], [2.0, 1.0], [0.75, 3.0]], np.float32)
WIDTH = 8


@pytest.fixture
def groups(native: Ranks) -> list[EpGroup]:
    return [EpGroup(port, [0, 1]) for port in native.join(0, 1)]


def tag_of(step_idx: int, epoch: int = 1) -> Tag:
    return Tag(epoch, step_idx, 0, 0)


def dispatch(group: EpGroup, tag: Tag) -> Exchange:
    return group.dispatch(
        tag=tag,
        hidden_states=rows_of(3, WIDTH),
        topk_ids=IDS,
        expert_rank=OWNERS,
        timeout_s=SOON_S,
    )


def outputs(batches: list[Batch]) -> np.ndarray:
    """[pairs of all batches, WIDTH], as one expert batch computes them."""
    found = [expert_output(b.rows[row], expert) for b in batches for row, expert in b.pairs]
    return np.array(found, np.float32).reshape(-1, WIDTH)


def test_one_call_answers_every_rank(groups: list[EpGroup]) -> None:
    exchanges = [dispatch(group, tag_of(0)) for group in groups]
    for group in groups:
        batches = group.recv(tag_of(0), SOON_S)
        assert [batch.source_rank for batch in batches] == [0, 1]
        group.reply(batches, outputs(batches))
    expected = moe_by_hand(rows_of(3, WIDTH), IDS, WEIGHTS)
    for group, exchange in zip(groups, exchanges, strict=True):
        got = group.combine(exchange, WEIGHTS, hidden_size=WIDTH, timeout_s=SOON_S)
        assert np.array_equal(got, expected)


def test_a_share_for_each_pair_or_none(groups: list[EpGroup], native: Ranks) -> None:
    exchanges = [dispatch(group, tag_of(0)) for group in groups]
    batches = groups[0].recv(tag_of(0), SOON_S)
    with pytest.raises(ValueError, match="one row per pair"):
        groups[0].reply(batches, np.zeros((1, WIDTH), np.float32))
    assert native.ports[0].num_open_requests == 2
    groups[0].reply(batches, outputs(batches))
    with pytest.raises(ValueError, match="answered already"):
        groups[0].reply(batches, outputs(batches))
    assert not exchanges[0].is_done()


def test_a_step_that_comes_early_is_kept(groups: list[EpGroup]) -> None:
    under_way = [dispatch(group, tag_of(step_idx)) for step_idx in range(2) for group in groups]
    for step_idx in (1, 0):
        batches = groups[0].recv(tag_of(step_idx), SOON_S)
        assert [batch.tag for batch in batches] == [tag_of(step_idx)] * 2
    assert not any(exchange.is_done() for exchange in under_way)


def test_a_deadline_names_who_has_not_sent(groups: list[EpGroup]) -> None:
    with dispatch(groups[0], tag_of(0)), pytest.raises(XcclTimeout) as caught:
        groups[0].recv(tag_of(0), SOON_S)
    assert caught.value.ranks == (1,)


def test_a_rank_that_left_is_lost_and_its_next_life_sends_anew(
    groups: list[EpGroup], native: Ranks
) -> None:
    under_way = [dispatch(groups[0], tag_of(0)), dispatch(groups[1], tag_of(1))]
    with pytest.raises(XcclTimeout):
        groups[0].recv(tag_of(0), SOON_S)
    native.ports[1].close()
    with pytest.raises(PeerLost) as caught:
        groups[0].recv(tag_of(0), SOON_S)
    assert caught.value.ranks == (1,)
    (port,) = native.join(1)
    with pytest.raises(XcclTimeout):  # what its last life sent early does not count
        groups[0].recv(tag_of(1), SOON_S)
    under_way.append(dispatch(EpGroup(port, [0, 1]), tag_of(0)))
    assert len(groups[0].recv(tag_of(0), SOON_S)) == 2


def test_strangers_are_refused(native: Ranks) -> None:
    ports: list[Port] = native.join(0, 1, 2)
    group = EpGroup(ports[0], [0, 1])
    with ports[2].exchange(rows_of(1, WIDTH)) as exchange:
        exchange.add(0, tag=tag_of(0))
        exchange.post(SOON_S)
        with pytest.raises(XcclTimeout):
            group.recv(tag_of(0), SOON_S)
        exchange.wait(SOON_S)
        assert exchange.refused_ranks == [0]


def test_arrays_of_another_type_are_refused(groups: list[EpGroup]) -> None:
    with pytest.raises(TypeError, match="topk_ids"):
        groups[0].dispatch(
            tag=tag_of(0),
            hidden_states=rows_of(3, WIDTH),
            topk_ids=IDS.astype(np.int64),
            expert_rank=OWNERS,
        )


def test_rows_of_another_order_are_copied(native: Ranks) -> None:
    a, b = native.join(0, 1)
    rows = np.asfortranarray(rows_of(5, WIDTH))
    with a.exchange(rows) as exchange:
        exchange.add(1, tag=tag_of(0))
        exchange.post(SOON_S)
        (batch,) = b.poll()
        assert np.array_equal(batch.rows, rows)
        with pytest.raises((ValueError, TypeError)):
            batch.rows[0, 0] = 1.0
