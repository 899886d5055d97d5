"""What the model knows of an exchange and of a request taken: who was sent what, in which epoch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.unit.xccl.ports import expert_output
from xdeepserve.xccl import Tag

WHOLE = 1  # kind: the answer is every row doubled
ROUTED = 2  # kind: the answer is one row per pair
TOP_K = 2


def stamp(server: int, tag: Tag) -> np.float32:
    """Added to every answer, so that one of another rank or epoch is seen to be another's."""
    return np.float32(1000 * server + tag.epoch)


def answer_of(batch: Any, server: int) -> np.ndarray:
    """What a server of the model answers."""
    rows = np.array(batch.rows)
    if batch.kind == WHOLE:
        return rows * np.float32(2) + stamp(server, batch.tag)
    out = [expert_output(rows[row], int(expert)) for row, expert in batch.pairs]
    return np.array(out, np.float32).reshape(-1, rows.shape[1]) + stamp(server, batch.tag)


@dataclass(eq=False)
class Taken:
    """A request in the hands of a server: the reference's batch and the native one."""

    server: int
    source: int
    batches: list[Any]
    is_past: bool = False  # the server has a new life; this is the old one's
    is_orphan: bool = False  # the asker has a new life, and the server knows


@dataclass(eq=False)
class UnderWay:
    """An exchange: the rows it sends and, by slot, to whom and under which tag it sent them last.

    Attributes:
        topk_ids: [T, TOP_K] of a routed exchange; None of one whose rows all go to one rank, which
            has one slot, 0.
    """

    asker: int
    rows: np.ndarray
    topk_ids: np.ndarray | None
    exchanges: list[Any]
    sent: dict[int, tuple[int, Tag]]

    def answered_slots(self) -> set[int]:
        """Slots whose answer is there."""
        replies = self.exchanges[0].replies()
        if self.topk_ids is None:
            return {0} if replies else set()
        return {int(slot) for reply in replies for slot in reply.slots}

    def move(self, slots: Iterable[int], rank_of: Any, tag: Tag) -> None:
        for slot in slots:
            self.sent[slot] = (rank_of(slot), tag)

    def expected(self, slot: int) -> np.ndarray:
        """The rows that answer a slot."""
        rank, tag = self.sent[slot]
        if self.topk_ids is None:
            return self.rows * np.float32(2) + stamp(rank, tag)
        expert = int(self.topk_ids.reshape(-1)[slot])
        return expert_output(self.rows[slot // TOP_K], expert) + stamp(rank, tag)

    def check(self, reply: Any) -> None:
        """An answer is of the rank and the epoch to which its slots were sent last."""
        if self.topk_ids is None:
            assert reply.rank == self.sent[0][0]
            assert np.array_equal(reply.rows, self.expected(0))
            return
        assert len(reply.rows) == len(reply.slots)
        for slot, row in zip(reply.slots, reply.rows, strict=True):
            assert reply.rank == self.sent[int(slot)][0]
            assert np.array_equal(row, self.expected(int(slot)))

    def combined(self, topk_weights: np.ndarray) -> np.ndarray:
        """[T, width]: the sum of all answers in slot order."""
        out = np.zeros(self.rows.shape, np.float32)
        for slot in sorted(self.sent):
            out[slot // TOP_K] += topk_weights.reshape(-1)[slot] * self.expected(slot)
        return out

    def release(self) -> None:
        for exchange in self.exchanges:
            exchange.release()
