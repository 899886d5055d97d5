"""ModuleServer: computes FFNs and experts for whoever asks, from whatever has arrived.

    poll -> group by (module, layer) -> one grouped computation each -> answer every asker

It keeps nothing of a request, never waits for a particular asker, and holds no more than what the
askers' slots hold. Any server can compute any layer and expert: weights are mapped, not owned.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.models.units import ExpertUnit, FfnUnit
from xdeepserve.ops import F32, I32, Array
from xdeepserve.transformerless.legs import Module
from xdeepserve.transformerless.partition import Partition
from xdeepserve.transformerless.stage_times import Stage, StageTimes
from xdeepserve.xccl import Batch, Port

POLL_S: Final = 0.02
"""Between two looks for ranks that want to be linked, while nobody asks."""

STUCK_AFTER_S: Final = 2.0
"""A loop that has not come round for so long, nor ever computed so long, is stuck."""

LONGEST_ROUNDS: Final = 10
"""So many times the CPU time of the longest round so far are no sign of being stuck, either."""

REFUSED_LAYER: Final = 1
REFUSED_ROWS: Final = 2

logger = logging.getLogger(__name__)


class ModuleServer:
    """Thread: the one that calls `run`; `stop` and the counters from any."""

    def __init__(
        self,
        port: Port,
        units: Partition,
        *,
        stage_times: StageTimes,
        stuck_after_s: float = STUCK_AFTER_S,
    ) -> None:
        """Serve all layers of `units` at `port`, which is closed when `run` ends."""
        self._port = port
        self._ffn = units.ffn
        self._experts = units.experts
        self._times = stage_times
        self._stop = threading.Event()
        self._stuck_after_s = stuck_after_s
        self._round_begun_s = SYSTEM_CLOCK.monotonic()
        self.num_rounds = 0
        self.num_rows = 0
        self.num_requests = 0

    def run(self) -> None:
        """Serve until `stop`; what was taken is answered first."""
        try:
            while not self._stop.is_set():
                self._port.discover_news()
                self.serve_once(POLL_S)
        finally:
            self._port.close()

    def beat(self) -> None:
        """Show askers that the loop lives, also while it computes for long. Any thread.

        Of a stuck loop nothing is shown, so that its askers go to others.
        """
        if SYSTEM_CLOCK.monotonic() - self._round_begun_s < self._stuck_after_s:
            self._port.beat()

    def stop(self) -> None:
        """Ask `run` to return."""
        self._stop.set()
        self._port.ring_self()

    def serve_once(self, timeout_s: float) -> int:
        """Answer what has arrived, waiting at most so long for the first; how many requests."""
        with self._times.measure(Stage.POLL):
            batches = self._port.poll(timeout_s)
        self._round_begun_s, begun_cpu_s = SYSTEM_CLOCK.monotonic(), time.thread_time()
        groups: dict[tuple[int, int], list[Batch]] = {}
        for batch in batches:
            groups.setdefault((batch.kind, batch.tag.layer_idx), []).append(batch)
        for (kind, layer_idx), group in groups.items():
            self._serve(kind, layer_idx, group)
        self.num_rounds += 1
        self.num_requests += len(batches)
        self._come_round(time.thread_time() - begun_cpu_s)
        return len(batches)

    def _come_round(self, cpu_s: float) -> None:
        """A round that computed for long is no surprise the next time; one that was stopped is."""
        self._stuck_after_s = max(self._stuck_after_s, LONGEST_ROUNDS * cpu_s)
        self._round_begun_s = SYSTEM_CLOCK.monotonic()

    def _serve(self, kind: int, layer_idx: int, group: list[Batch]) -> None:
        unit = self._unit(kind, layer_idx)
        if unit is None:
            _refuse(group, REFUSED_LAYER)
        elif isinstance(unit, FfnUnit):
            with self._times.measure(Stage.FFN):
                self._compute_ffn(unit, group)
        else:
            with self._times.measure(Stage.EXPERT):
                self._compute_experts(unit, group)

    def _unit(self, kind: int, layer_idx: int) -> FfnUnit | ExpertUnit | None:
        """What is asked; None when there is no such thing in this model."""
        if layer_idx >= len(self._ffn):
            return None
        if kind == Module.FFN:
            return self._ffn[layer_idx]
        return self._experts[layer_idx] if kind == Module.EXPERT else None

    def _compute_ffn(self, unit: FfnUnit, group: list[Batch]) -> None:
        hidden_size = unit.gate_up.shape[2]
        group = _keep(group, [_has_rows(batch, hidden_size) for batch in group])
        if not group:
            return
        rows = _joined([batch.rows for batch in group])
        counts = [batch.num_rows for batch in group]
        self._answer(group, counts, hidden_size, partial(unit, rows))

    def _compute_experts(self, unit: ExpertUnit, group: list[Batch]) -> None:
        hidden_size = unit.gate_up.shape[2]
        group = _keep(group, [_has_pairs(batch, hidden_size) for batch in group])
        if not group:
            return
        pairs = [batch.pairs for batch in group]
        taken = zip(group, pairs, strict=True)
        rows = _joined([batch.rows[each[:, 0]] for batch, each in taken])
        experts = _joined([each[:, 1] for each in pairs]) % np.int32(unit.num_experts)
        counts = [len(each) for each in pairs]
        self._answer(group, counts, hidden_size, partial(_run_sorted, unit, rows, experts))

    def _answer(
        self,
        group: Sequence[Batch],
        counts: Sequence[int],
        hidden_size: int,
        compute: Callable[[F32 | None], F32],
    ) -> None:
        """Each asker its consecutive share of the rows, in the order it sent them.

        What only one asks is computed where it reads the answer: `compute` writes to its argument.
        """
        self.num_rows += sum(counts)
        if len(group) == 1:
            place = group[0].answer_buffer(counts[0], hidden_size)
            if place is not None:  # else the asker has ended
                compute(place)
                group[0].commit(counts[0], hidden_size)
            return
        outputs, start = compute(None), 0
        for batch, count in zip(group, counts, strict=True):
            batch.reply(outputs[start : start + count])
            start += count


def _joined(parts: Sequence[Array]) -> Array:
    """All rows one after the other; a single part as it is."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _run_sorted(unit: ExpertUnit, rows: F32, experts: I32, out: F32 | None) -> F32:
    """[R, H]: rows [R, H], each through its expert [R], sorted by expert on the way."""
    counts = np.bincount(experts, minlength=unit.num_experts).astype(np.int32)
    if (experts[1:] >= experts[:-1]).all():
        return unit(rows, counts, out)
    order = np.argsort(experts, kind="stable")
    outputs = np.empty_like(rows) if out is None else out
    outputs[order] = unit(rows[order], counts)
    return outputs


def _keep(group: list[Batch], is_valid: list[bool]) -> list[Batch]:
    """Those that can be computed; the others are refused."""
    bad = [batch for batch, valid in zip(group, is_valid, strict=True) if not valid]
    _refuse(bad, REFUSED_ROWS)
    return [batch for batch, valid in zip(group, is_valid, strict=True) if valid]


def _refuse(group: Sequence[Batch], reason: int) -> None:
    for batch in group:
        logger.error("%r cannot be computed here (reason %d): another model?", batch, reason)
        batch.refuse(reason)


def _has_rows(batch: Batch, hidden_size: int) -> bool:
    rows = batch.rows
    return rows.dtype == np.float32 and rows.shape[1] == hidden_size


def _has_pairs(batch: Batch, hidden_size: int) -> bool:
    if not _has_rows(batch, hidden_size) or batch.meta.size % 2 or not batch.meta.size:
        return False
    pairs = batch.pairs
    return bool(pairs.min() >= 0 and pairs[:, 0].max() < batch.num_rows)
