"""Rules for exchanges of rows: slots, answers, refusals, losses, and sending again elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from tests.unit.xccl.model.lives import NOW_S, RANKS, is_error, outcome, ranks
from tests.unit.xccl.model.under_way import ROUTED, TOP_K, WHOLE, Taken, UnderWay, answer_of
from tests.unit.xccl.model.windows import Windows
from tests.unit.xccl.ports import SMALL
from xdeepserve.errors import PeerLost, XcclError, XcclTimeout
from xdeepserve.xccl import Tag

WIDTH = 4
NUM_EXPERTS = 5
ALL = 64  # more requests than there can be
picks = st.integers(0, 50)
_rng = np.random.default_rng(0)
tables = st.sampled_from([_rng.integers(0, len(RANKS), NUM_EXPERTS).tolist() for _ in range(12)])
"""Which rank owns each expert. Drawn whole, which takes a tenth of the time."""
RankGroup = tuple[int, ...]
topk = st.sampled_from(
    [_rng.integers(-1, NUM_EXPERTS, (1 + i % 3, TOP_K)).tolist() for i in range(12)]
)
groups = st.sampled_from([(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2), RANKS])


class Exchanges(Windows):
    """Askers and servers; an answer counts only for the rank and epoch it was asked of last."""

    def begin(self) -> None:
        super().begin()
        self.step_idx = 0
        self.epoch = 1
        self.under_way: list[UnderWay] = []
        self.taken: list[Taken] = []

    def forget(self, rank: int) -> None:
        super().forget(rank)
        for item in self.under_way:
            if item.asker == rank:
                item.release()
        self.under_way = [item for item in self.under_way if item.asker != rank]
        for taken in self.taken:
            taken.is_past |= taken.server == rank
            taken.is_orphan |= taken.source == rank and not taken.is_past

    def teardown(self) -> None:
        for item in getattr(self, "under_way", []):
            item.release()
        super().teardown()

    # Asking

    def next_tag(self) -> Tag:
        self.step_idx += 1
        return Tag(self.epoch, self.step_idx, 0, 0)

    def post(self, a: int, rows: np.ndarray, plan: Any) -> list[Any]:
        """Both exchanges, posted as far as slots are free; what does not fit follows in waits."""
        exchanges = self.each(lambda ports, _: ports[a].exchange(rows))
        for exchange in exchanges:
            plan(exchange)
        posted = self.each(lambda _, i: exchanges[i].post(NOW_S))
        assert posted[0] == posted[1]
        assert posted[0] is None or posted[0][0] is XcclTimeout
        return exchanges

    @rule(a=ranks, b=ranks, num_rows=st.integers(1, 3))
    def ask(self, a: int, b: int, num_rows: int) -> None:
        tag = self.next_tag()
        rows = np.full((num_rows, WIDTH), self.step_idx, np.float32)
        exchanges = self.post(a, rows, lambda x: x.add(b, tag=tag, kind=WHOLE))
        self.under_way.append(UnderWay(a, rows, None, exchanges, {0: (b, tag)}))

    @rule(a=ranks, ids=topk, table=tables, also=groups)
    def ask_experts(self, a: int, ids: list[list[int]], table: list[int], also: RankGroup) -> None:
        tag = self.next_tag()
        topk_ids, owners = np.array(ids, np.int32), np.array(table, np.int32)
        rows = np.arange(len(ids) * WIDTH, dtype=np.float32).reshape(-1, WIDTH) + self.step_idx
        pairs = topk_ids.reshape(-1)
        exchanges = self.post(
            a,
            rows,
            lambda x: x.add_routed(pairs, TOP_K, None, owners, tag, ROUTED, list(also)),
        )
        sent = {slot: (table[expert], tag) for slot, expert in enumerate(pairs) if expert >= 0}
        self.under_way.append(UnderWay(a, rows, topk_ids, exchanges, sent))

    # Sending again

    def pick_one(self, pick: int) -> UnderWay | None:
        """An exchange, its answers collected as a caller's `wait` had done."""
        if not self.under_way:
            return None
        item = self.under_way[pick % len(self.under_way)]
        self.agree(lambda _, i: item.exchanges[i].is_done())
        return item

    @rule(pick=picks, to=ranks)
    def resend(self, pick: int, to: int) -> None:
        """All rows go to another rank in the next epoch, unless their answer is there."""
        item = self.pick_one(pick)
        if item is None or item.topk_ids is not None:
            return
        self.epoch += 1
        old, tag = item.sent[0]
        tag = tag._replace(epoch=self.epoch)
        is_open = not item.answered_slots()
        assert self.agree(lambda _, i: item.exchanges[i].resend(old, to, tag)) == is_open
        if is_open:
            item.sent[0] = (to, tag)

    @rule(pick=picks, gone=groups, table=tables)
    def reroute(self, pick: int, gone: RankGroup, table: list[int]) -> None:
        """What some ranks have not answered goes where a new table says, in the next epoch."""
        item = self.pick_one(pick)
        if item is None or item.topk_ids is None:
            return
        self.epoch += 1
        owners, tag = np.array(table, np.int32), self.next_tag()
        answered = item.answered_slots()
        moved = [s for s, (rank, _) in item.sent.items() if rank in gone and s not in answered]
        ids = item.topk_ids.reshape(-1)
        got = self.agree(lambda _, i: item.exchanges[i].reroute(list(gone), owners, tag))
        assert got == bool(moved)
        item.move(moved, lambda slot: table[ids[slot]], tag)

    # Serving

    @rule(b=ranks, limit=st.integers(1, 3))
    def poll(self, b: int, limit: int) -> None:
        self.take(b, limit)

    def take(self, b: int, limit: int) -> list[Taken]:
        batches = self.each(lambda ports, _: ports[b].poll(NOW_S, limit))
        described = [
            [(x.source_rank, x.tag, x.kind, x.rows.tolist(), x.meta.tolist()) for x in found]
            for found in batches
        ]
        assert described[0] == described[1]
        assert len(batches[0]) <= limit
        taken = [Taken(b, pair[0].source_rank, list(pair)) for pair in zip(*batches, strict=True)]
        self.taken += taken
        return taken

    @rule(pick=picks, refuse=st.booleans())
    def answer(self, pick: int, refuse: bool) -> None:
        """Perhaps late: after it was sent again elsewhere, or after a life of either side."""
        if self.taken:
            self.give_answer(self.taken.pop(pick % len(self.taken)), refuse)

    def give_answer(self, taken: Taken, refuse: bool) -> None:
        for batch in taken.batches:
            out = answer_of(batch, taken.server)
            is_wanted = batch.refuse(7) if refuse else batch.reply(out)
        assert is_wanted != taken.is_orphan  # the native one's, which looks at lives
        again = outcome(lambda: taken.batches[1].refuse(8))
        assert again is (False if taken.is_orphan else ValueError)

    # Collecting

    @rule(pick=picks, then_release=st.booleans())
    def collect(self, pick: int, then_release: bool) -> None:
        if not self.under_way:
            return
        item = self.under_way[pick % len(self.under_way)]
        waited = self.agree(lambda _, i: item.exchanges[i].wait(NOW_S))
        assert waited is None or waited[0] in (XcclTimeout, PeerLost)
        first, second = item.exchanges
        assert first.parts == second.parts
        for replies in zip(first.replies(), second.replies(), strict=True):
            for reply in replies:
                item.check(reply)
        if waited is None and item.topk_ids is not None:
            self.combine(item)
        if then_release:
            item.release()
            self.under_way.remove(item)

    def combine(self, item: UnderWay) -> None:
        assert item.topk_ids is not None
        weights = (np.arange(item.topk_ids.size, dtype=np.float32) + 1).reshape(-1, TOP_K)
        sums = self.each(
            lambda _, i: item.exchanges[i].e2a(weights, hidden_size=WIDTH, timeout_s=NOW_S)
        )
        is_refused = item.exchanges[1].refused_ranks != []
        for found in sums:
            assert is_error(found) == is_refused
            if is_refused:
                assert found[0] is XcclError
            else:
                assert np.array_equal(found, item.combined(weights))

    @rule()
    def come_to_rest(self) -> None:
        """Everything is given up and answered: every slot of every pair can be used again."""
        for item in self.under_way:
            item.release()
        self.under_way = []
        self.serve_all()
        for a in RANKS:
            for b in RANKS:
                for _ in range(SMALL.row_slots):
                    self.ask(a, b, 1)
        self.serve_all()
        while self.under_way:
            self.collect(0, then_release=True)
        for port in self.native.values():
            port.check_integrity()

    def serve_all(self) -> None:
        for rank in RANKS:
            self.take(rank, ALL)
        while self.taken:
            self.give_answer(self.taken.pop(), refuse=False)

    @invariant()
    def requests_are_open_until_answered(self) -> None:
        for rank, port in self.native.items():
            mine = [t for t in self.taken if t.server == rank and not t.is_past and not t.is_orphan]
            assert port.num_open_requests == len(mine)
