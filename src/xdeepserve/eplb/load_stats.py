"""ExpertLoadStats: how many tokens each expert of each layer got, in a ring of time windows.

    DP group:    record(layer, topk_ids) ... report()      --> running totals, when asked
    controller:  add(report.since(the one before)) ... roll()  --> load() / windows() --> placement

Both ends use the same class. A lost report loses nothing, the next one has its counts too. Memory
is bounded: num_windows x L x E counters.
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

from xdeepserve.eplb.rows import F64
from xdeepserve.errors import ConfigError, IntegrityError
from xdeepserve.ops import I32

_WIRE = np.dtype("<u4")


class ExpertLoadReport(msgspec.Struct, frozen=True, gc=False, tag=True):
    """What one DP group counted.

    Attributes:
        num_layers: L.
        num_experts: E.
        counts: [L, E] little-endian uint32, row by row; modulo 2**32.
    """

    num_layers: int
    num_experts: int
    counts: bytes

    def since(self, earlier: ExpertLoadReport) -> ExpertLoadReport:
        """What was counted between two reports of running totals, less than 2**32 per expert.

        Raises:
            IntegrityError: the sizes contradict each other.
        """
        if (self.num_layers, self.num_experts) != (earlier.num_layers, earlier.num_experts):
            raise IntegrityError(
                f"an expert load report of {self.num_layers} x {self.num_experts} follows one of "
                f"{earlier.num_layers} x {earlier.num_experts}"
            )
        counted = self.to_array() - earlier.to_array()
        return ExpertLoadReport(self.num_layers, self.num_experts, _to_wire(counted))

    def to_array(self) -> NDArray[np.int64]:
        """[L, E] int64.

        Raises:
            IntegrityError: the sizes contradict each other.
        """
        expected = self.num_layers * self.num_experts * _WIRE.itemsize
        if min(self.num_layers, self.num_experts) < 1 or len(self.counts) != expected:
            raise IntegrityError(
                f"an expert load report of {len(self.counts)} bytes claims "
                f"{self.num_layers} layers x {self.num_experts} experts"
            )
        flat = np.frombuffer(self.counts, _WIRE).astype(np.int64)
        return flat.reshape(self.num_layers, self.num_experts)


def _to_wire(counts: NDArray[np.int64]) -> bytes:
    return counts.astype(_WIRE).tobytes()


class ExpertLoadStats:
    """Counters of one DP group, or of all of them at the controller.

    One thread counts; `report` may be called from another and misses at most the step under way.
    """

    def __init__(self, *, num_layers: int, num_experts: int, num_windows: int = 8) -> None:
        if min(num_layers, num_experts, num_windows) < 1:
            raise ConfigError(
                f"expert load statistics need at least one layer, expert and window, got "
                f"{num_layers}, {num_experts}, {num_windows}"
            )
        self._ring = np.zeros((num_windows, num_layers, num_experts), np.int64)
        self._open = 0
        self._num_closed = 0

    def record(self, layer_idx: int, topk_ids: I32) -> None:
        """Count one layer of one step: topk_ids [T, K] logical ids, -1 = skipped."""
        counts = np.bincount(topk_ids.ravel() + 1, minlength=self._ring.shape[2] + 1)
        if counts.size != self._ring.shape[2] + 1:
            raise IntegrityError(
                f"expert {counts.size - 2} was routed to, but there are {self._ring.shape[2]}"
            )
        self._ring[self._open, layer_idx] += counts[1:]

    def add(self, report: ExpertLoadReport) -> None:
        """Count a report into the open window.

        Raises:
            IntegrityError: the report is damaged or of another model.
        """
        counts = report.to_array()
        if counts.shape != self._ring.shape[1:]:
            raise IntegrityError(
                f"an expert load report of shape {counts.shape} does not fit {self._ring.shape[1:]}"
            )
        self._ring[self._open] += counts

    def report(self) -> ExpertLoadReport:
        """The open window as a message; in a group, which never rolls: all since its start."""
        window = self._ring[self._open]
        return ExpertLoadReport(self._ring.shape[1], self._ring.shape[2], _to_wire(window))

    def roll(self) -> None:
        """Close the open window; the oldest one is forgotten when the ring is full."""
        self._num_closed = min(self._num_closed + 1, len(self._ring) - 1)
        self._open = (self._open + 1) % len(self._ring)
        self._ring[self._open] = 0

    def windows(self) -> NDArray[np.int64]:
        """[W, L, E] copy, oldest first, the open one last."""
        first = self._open - self._num_closed
        return self._ring[np.arange(first, self._open + 1) % len(self._ring)]

    def load(self, *, decay: float = 0.5) -> F64:
        """[L, E] weighted sum of the windows: the open one counts 1, each older one decay less.

        Raises:
            ConfigError: decay is not in (0, 1].
        """
        if not 0 < decay <= 1:
            raise ConfigError(f"decay={decay} must be above 0 and at most 1")
        weights = decay ** np.arange(self._num_closed, -1, -1, dtype=np.float64)
        total: F64 = np.einsum("w,wle->le", weights, self.windows())
        return total
