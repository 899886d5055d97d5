"""HealthTracker: tells a worker that works from one that is busy and one that hangs.

A worker's loop reports progress in its heartbeat. A process that answers without progress, or
does not answer but uses CPU, is busy; one that does neither is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xdeepserve.launch.deployment import SupervisionConfig
from xdeepserve.launch.supervisor.messages import WorkerState
from xdeepserve.messages import Heartbeat

BUSY_CPU_SHARE: Final = 0.1
"""CPU seconds per second from which a worker counts as computing."""

MAX_GAP_INTERVALS: Final = 4
"""A longer pause between observations is the observer's own, and not held against the worker."""


@dataclass(frozen=True, slots=True)
class Observation:
    """One look at a worker.

    Attributes:
        now_s: monotonic time.
        heartbeat: its answer; None when it gave none.
        cpu_s: CPU seconds since its start.
        is_stopped: by a signal.
    """

    now_s: float
    heartbeat: Heartbeat | None
    cpu_s: float
    is_stopped: bool


class HealthTracker:
    """The health of one incarnation of a worker, from the moment it was ready."""

    def __init__(self, config: SupervisionConfig, now_s: float) -> None:
        self._config = config
        self._suspect_after_s = min(3 * config.heartbeat_interval_s, config.freeze_timeout_s)
        self._now_s = self._answer_s = self._progress_s = self._computing_s = now_s
        self._progress: float | None = None
        self._cpu_s = 0.0

    def observe(self, look: Observation) -> WorkerState:
        """Account for one observation; returns READY, BUSY or FROZEN."""
        self._forgive_gap(look.now_s)
        if (beat := look.heartbeat) is not None:
            self._answer_s = look.now_s
            if beat.is_idle or beat.progress != self._progress:
                self._progress, self._progress_s = beat.progress, look.now_s
        if look.cpu_s - self._cpu_s > BUSY_CPU_SHARE * (look.now_s - self._now_s):
            self._computing_s = look.now_s
        self._cpu_s, self._now_s = look.cpu_s, look.now_s
        if self._now_s - self._progress_s < self._suspect_after_s:
            return WorkerState.READY
        is_frozen = look.is_stopped or self._silent_s >= self._suspect_after_s
        return WorkerState.FROZEN if is_frozen else WorkerState.BUSY

    @property
    def is_lost(self) -> bool:
        """Whether the worker should be killed: frozen or without progress for too long."""
        return (
            self._silent_s >= self._config.freeze_timeout_s
            or self._now_s - self._progress_s >= self._config.busy_timeout_s
        )

    @property
    def _silent_s(self) -> float:
        """How long it has neither answered nor computed, at the latest observation."""
        return self._now_s - max(self._answer_s, self._computing_s)

    def _forgive_gap(self, now_s: float) -> None:
        """The observer may have been stopped or starved itself; then its clocks start later."""
        interval_s = self._config.heartbeat_interval_s
        gap_s = now_s - self._now_s
        if gap_s > MAX_GAP_INTERVALS * interval_s:
            self._answer_s += gap_s - interval_s
            self._progress_s += gap_s - interval_s
            self._computing_s += gap_s - interval_s
            self._now_s = now_s - interval_s
