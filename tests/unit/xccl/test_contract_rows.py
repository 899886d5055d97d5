"""Contract of row exchanges: one suite over the reference (plain Python) and the native core."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.xccl.ports import SMALL, SOON_S, TAG, Ranks, moe_by_hand, rows_of, serve
from xdeepserve.errors import PeerLost, XcclError, XcclTimeout
from xdeepserve.xccl import PartState, Tag

NEXT_EPOCH = TAG._replace(epoch=2)
OWNERS = np.array([1, 1, 2, 2], np.int32)  # expert -> rank


def routing(num_tokens: int, top_k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(4)[:top_k] for _ in range(num_tokens)]).astype(np.int32)
    return ids, rng.random((num_tokens, top_k), dtype=np.float32)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a2e_then_e2a_is_the_moe_layer(ranks: Ranks, top_k: int) -> None:
    a, one, two = ranks.join(0, 1, 2)
    hidden = rows_of(5, 24)
    ids, weights = routing(5, top_k)
    ids[3, 0] = -1
    exchange = a.a2e(tag=TAG, hidden_states=hidden, topk_ids=ids, expert_rank=OWNERS)
    assert not exchange.is_done()
    serve([*one.poll(), *two.poll()])
    out = exchange.e2a(weights, hidden_size=24, timeout_s=SOON_S)
    assert np.array_equal(out, moe_by_hand(hidden, ids, weights))
    exchange.release()


def test_a_row_travels_once_per_rank_with_its_pairs_sorted_by_expert(ranks: Ranks) -> None:
    a, one, two = ranks.join(0, 1, 2)
    hidden = rows_of(3, 4)
    ids = np.array([[1, 0], [2, 1], [0, 3]], np.int32)
    exchange = a.a2e(tag=TAG, hidden_states=hidden, topk_ids=ids, expert_rank=OWNERS, kind=9)
    (batch,) = one.poll()
    assert (batch.source_rank, batch.tag, batch.kind, batch.reply_rows) == (0, TAG, 9, 4)
    assert batch.pairs.tolist() == [[0, 0], [1, 0], [0, 1], [2, 1]]
    assert np.array_equal(batch.rows, hidden[[0, 2, 1]])
    (other,) = two.poll()
    assert other.pairs.tolist() == [[0, 2], [1, 3]]
    assert np.array_equal(other.rows, hidden[[1, 2]])
    serve([batch, other])
    assert exchange.is_done()
    assert [reply.slots.tolist() for reply in exchange.replies()] == [[1, 4, 0, 3], [2, 5]]
    exchange.release()


@pytest.mark.parametrize("quantize_back", [False, True])
def test_quantized_rows(ranks: Ranks, quantize_back: bool) -> None:
    a, one, two = ranks.join(0, 1, 2)
    hidden = rows_of(6, 40)
    hidden[2] = 0
    hidden[3] *= np.float32(2.0**-110)
    ids, weights = routing(6, 2)
    exchange = a.a2e(tag=TAG, hidden_states=hidden, topk_ids=ids, expert_rank=OWNERS, quantize=True)
    batches = [*one.poll(), *two.poll()]
    assert {batch.rows.dtype for batch in batches} == {np.dtype(np.int8)}
    serve(batches, quantize=quantize_back)
    out = exchange.e2a(weights, hidden_size=40, timeout_s=SOON_S)
    assert np.abs(out - moe_by_hand(hidden, ids, weights)).max() < 0.2
    exchange.release()


def test_parts_without_routing_and_their_metadata(ranks: Ranks) -> None:
    a, one, two = ranks.join(0, 1, 2)
    rows = rows_of(4, 8)
    exchange = a.exchange(rows)
    exchange.add(1, tag=TAG, kind=2, meta=np.array([5, -6], np.int32), reply_rows=4)
    exchange.add(2, tag=TAG, row_idx=np.array([3, 1], np.int32))
    exchange.post(SOON_S)
    (first,), (second,) = one.poll(), two.poll()
    assert (first.meta.tolist(), first.reply_rows, first.kind) == ([5, -6], 4, 2)
    assert np.array_equal(first.rows, rows)
    assert np.array_equal(second.rows, rows[[3, 1]])
    first.reply(first.rows * np.float32(2))
    second.reply(np.array([[7]], np.uint8))
    exchange.wait(SOON_S)
    replies = exchange.replies()
    assert np.array_equal(replies[0].rows, rows * np.float32(2))
    assert replies[1].rows.tolist() == [[7]]
    exchange.release()


def test_a_deadline_names_exactly_the_ranks_that_owe(ranks: Ranks) -> None:
    a, one, two = ranks.join(0, 1, 2)
    ids, _ = routing(8, 2)
    exchange = a.a2e(tag=TAG, hidden_states=rows_of(8, 4), topk_ids=ids, expert_rank=OWNERS)
    serve(one.poll())
    with pytest.raises(XcclTimeout) as caught:
        exchange.wait(SOON_S)
    assert caught.value.ranks == (2,)
    serve(two.poll())
    exchange.wait(SOON_S)
    exchange.release()


def test_reroute_sends_what_is_unanswered_under_the_new_epoch(ranks: Ranks) -> None:
    a, one, two = ranks.join(0, 1, 2)
    hidden = rows_of(6, 8)
    ids, weights = routing(6, 2)
    exchange = a.a2e(tag=TAG, hidden_states=hidden, topk_ids=ids, expert_rank=OWNERS)
    serve(one.poll())
    late = two.poll()
    assert exchange.reroute([2], np.array([1, 1, 1, 1], np.int32), NEXT_EPOCH)
    exchange.post(SOON_S)
    (again,) = one.poll()
    assert again.tag == NEXT_EPOCH
    assert {int(expert) for _, expert in again.pairs} <= {2, 3}
    serve([again])
    serve(late)  # answers of the old epoch: dropped
    out = exchange.e2a(weights, hidden_size=8, timeout_s=SOON_S)
    assert np.array_equal(out, moe_by_hand(hidden, ids, weights))
    assert [part.state for part in exchange.parts] == [
        PartState.ANSWERED,
        PartState.MOVED,
        PartState.ANSWERED,
    ]
    exchange.release()


def test_resend_moves_an_unrouted_part(ranks: Ranks) -> None:
    a, one, two = ranks.join(0, 1, 2)
    rows = rows_of(2, 8)
    exchange = a.exchange(rows)
    exchange.add(1, tag=TAG, kind=4)
    exchange.post(SOON_S)
    assert exchange.resend(1, 2, NEXT_EPOCH)
    assert not exchange.resend(1, 2, NEXT_EPOCH)
    exchange.post(SOON_S)
    assert one.poll() == []  # given up before it was taken
    (batch,) = two.poll()
    assert (batch.tag, batch.kind) == (NEXT_EPOCH, 4)
    batch.reply(batch.rows.copy())
    exchange.wait(SOON_S)
    exchange.release()


def test_a_refusal_carries_its_detail_and_can_be_rerouted(ranks: Ranks) -> None:
    a, one, two = ranks.join(0, 1, 2)
    hidden = rows_of(4, 8)
    ids = np.zeros((4, 1), np.int32)
    weights = np.ones((4, 1), np.float32)
    exchange = a.a2e(tag=TAG, hidden_states=hidden, topk_ids=ids, expert_rank=OWNERS)
    for batch in one.poll():
        batch.refuse(1234)
    exchange.wait(SOON_S)
    (part,) = exchange.parts
    assert (part.rank, part.state, part.detail) == (1, PartState.REFUSED, 1234)
    with pytest.raises(XcclError):
        exchange.e2a(weights, hidden_size=8, timeout_s=SOON_S)
    exchange.reroute([1], np.full(4, 2, np.int32), NEXT_EPOCH)
    exchange.post(SOON_S)
    serve(two.poll())
    out = exchange.e2a(weights, hidden_size=8, timeout_s=SOON_S)
    assert np.array_equal(out, moe_by_hand(hidden, ids, weights))
    exchange.release()


def test_a_request_is_answered_once(ranks: Ranks) -> None:
    a, one = ranks.join(0, 1)
    exchange = a.exchange(rows_of(1, 4))
    exchange.add(1, tag=TAG)
    exchange.post(SOON_S)
    (batch,) = one.poll()
    batch.reply(rows_of(1, 4))
    with pytest.raises(ValueError, match="answered"):
        batch.reply(rows_of(1, 4))
    exchange.release()


def test_slots_are_bounded_and_come_back_with_answers(ranks: Ranks) -> None:
    a, one = ranks.join(0, 1)
    rows = rows_of(1, 4)

    def ask(step_idx: int) -> object:
        exchange = a.exchange(rows)
        exchange.add(1, tag=Tag(1, step_idx, 0, 0))
        exchange.post(SOON_S)
        return exchange

    first, second = ask(0), ask(1)
    with pytest.raises(XcclTimeout) as caught:
        ask(2)
    assert caught.value.ranks == (1,)
    for batch in one.poll():
        batch.reply(rows)
    first.wait(SOON_S)
    first.release()
    third = ask(3)
    assert [batch.tag.step_idx for batch in one.poll()] == [3]
    second.release()
    third.release()


def test_an_abandoned_slot_is_free_once_its_late_answer_is_there(ranks: Ranks) -> None:
    a, one = ranks.join(0, 1)
    rows = rows_of(1, 4)
    for _ in range(SMALL.row_slots):
        exchange = a.exchange(rows)
        exchange.add(1, tag=TAG)
        exchange.post(SOON_S)
        taken = one.poll()
        exchange.release()
    blocked = a.exchange(rows)
    blocked.add(1, tag=NEXT_EPOCH)
    with pytest.raises(XcclTimeout):
        blocked.post(SOON_S)
    taken[0].reply(rows)
    with pytest.raises(XcclTimeout):  # the first slot's request is still unanswered
        blocked.post(SOON_S)
    blocked.release()


def test_a_closed_peer_is_lost_and_a_new_life_starts_afresh(ranks: Ranks) -> None:
    a, one, two = ranks.join(0, 1, 2)
    hidden = rows_of(6, 8)
    ids, weights = routing(6, 2)
    a.send(2, np.array([1], np.uint8), timeout_s=SOON_S)
    exchange = a.a2e(tag=TAG, hidden_states=hidden, topk_ids=ids, expert_rank=OWNERS)
    two.close()
    serve(one.poll())
    with pytest.raises(PeerLost) as caught:
        exchange.wait(1.0)
    assert caught.value.ranks == (2,)
    with pytest.raises(PeerLost):
        a.recv(2, np.zeros(1, np.uint8), timeout_s=1.0)
    (again,) = ranks.join(2)
    with pytest.raises(XcclTimeout):  # the old life's message is gone
        again.recv(0, np.zeros(1, np.uint8), timeout_s=SOON_S)
    assert again.poll() == []
    exchange.reroute([2], OWNERS, NEXT_EPOCH)
    exchange.post(SOON_S)
    serve(again.poll())
    out = exchange.e2a(weights, hidden_size=8, timeout_s=SOON_S)
    assert np.array_equal(out, moe_by_hand(hidden, ids, weights))
    exchange.release()


@pytest.mark.parametrize("bad", [4, -2, 2**30])
def test_an_expert_that_does_not_exist_is_refused(ranks: Ranks, bad: int) -> None:
    a, _ = ranks.join(0, 1)
    ids = np.array([[bad]], np.int32)
    with pytest.raises(ValueError, match="expert"):
        a.a2e(tag=TAG, hidden_states=rows_of(1, 4), topk_ids=ids, expert_rank=OWNERS)


def test_a_rank_that_was_never_attached(ranks: Ranks) -> None:
    (a,) = ranks.join(0)
    with pytest.raises(ValueError, match="not attached"):
        a.send(3, np.zeros(1, np.uint8), timeout_s=SOON_S)
    exchange = a.exchange(rows_of(1, 4))
    exchange.add(3, tag=TAG)
    with pytest.raises(PeerLost) as caught:
        exchange.wait(SOON_S)
    assert caught.value.ranks == (3,)
    exchange.release()
