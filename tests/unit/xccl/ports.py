"""Both implementations behind one builder: ranks of one run, linked with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xdeepserve.xccl import Batch, Layout, Port, Tag
from xdeepserve.xccl.reference import ReferencePort, ReferenceRun

SMALL = Layout(
    max_ranks=4,
    p2p_slots=4,
    p2p_slot_bytes=64,
    row_slots=2,
    request_bytes=8192,
    reply_bytes=8192,
    window_bytes=4096,
)
TAG = Tag(epoch=1, step_idx=7, layer_idx=3, microbatch_idx=1)
SOON_S = 0.02
"""Long enough to notice what has happened already; nobody else acts in these tests."""

AnyPort = Any  # Port or ReferencePort: the same verbs


class Ranks:
    """The ranks of a run; `join` starts a life and links it with everybody."""

    def __init__(self, start: Callable[[int], AnyPort], link: Callable[[list[AnyPort]], None]):
        self._start = start
        self._link = link
        self.ports: dict[int, AnyPort] = {}
        self.past: list[AnyPort] = []

    def join(self, *ranks: int) -> list[AnyPort]:
        for rank in ranks:
            if rank in self.ports:
                self.past.append(self.ports[rank])
            self.ports[rank] = self._start(rank)
        self._link([port for _, port in sorted(self.ports.items())])
        return [self.ports[rank] for rank in ranks]

    def close(self) -> None:
        for port in [*self.ports.values(), *self.past]:
            port.close()


def native_ranks(run_id: str, layout: Layout = SMALL, *, frozen_after_s: float = 2.0) -> Ranks:
    def link(ports: list[Port]) -> None:
        for port in ports:
            for other in ports:
                port.attach(other.blob())

    def start(rank: int) -> Port:
        return Port(run_id, f"r{rank}", rank, layout=layout, frozen_after_s=frozen_after_s)

    return Ranks(start, link)


def reference_ranks(layout: Layout = SMALL) -> Ranks:
    run = ReferenceRun(layout)

    def start(rank: int) -> ReferencePort:
        return run.join(rank)

    return Ranks(start, lambda ports: None)


def rows_of(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, width), dtype=np.float32)


def expert_output(row: np.ndarray, expert: int) -> np.ndarray:
    """What the experts of these tests compute: exact in float32."""
    return (row * np.float32(expert + 1)).astype(np.float32)


def serve(batches: Sequence[Batch], *, quantize: bool = False) -> None:
    """Answers each batch with one row per pair."""
    for batch in batches:
        rows = dequantized(batch)
        out = [expert_output(rows[row], expert) for row, expert in batch.pairs]
        width = batch.rows.shape[1]
        assert batch.reply(np.array(out, np.float32).reshape(-1, width), quantize=quantize)


def dequantized(batch: Batch) -> np.ndarray:
    """[num_rows, width] float32 of a batch of any row type."""
    if batch.scales is not None:
        return (batch.scales[:, None] * batch.rows.astype(np.float32)).astype(np.float32)
    if batch.rows.dtype == np.uint16:
        return (batch.rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return batch.rows


def moe_by_hand(
    hidden_states: np.ndarray, topk_ids: np.ndarray, topk_weights: np.ndarray
) -> np.ndarray:
    """[T, H]: what dispatch, experts and combine together are to give."""
    out = np.zeros(hidden_states.shape, np.float32)
    for t, k in np.ndindex(*topk_ids.shape):
        if topk_ids[t, k] >= 0:
            out[t] += topk_weights[t, k] * expert_output(hidden_states[t], int(topk_ids[t, k]))
    return out
