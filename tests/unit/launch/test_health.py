"""HealthTracker: working, busy, frozen, lost; and an observer that was away."""

from __future__ import annotations

from xdeepserve.launch.deployment import SupervisionConfig
from xdeepserve.launch.supervisor.health import HealthTracker, Observation
from xdeepserve.launch.supervisor.messages import WorkerState
from xdeepserve.messages import Heartbeat

CONFIG = SupervisionConfig(heartbeat_interval_s=1.0, freeze_timeout_s=10.0, busy_timeout_s=30.0)


class Watched:
    """A tracker fed once per second."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.cpu_s = 5.0
        self.tracker = HealthTracker(CONFIG, self.now_s)

    def see(
        self,
        progress: float | None,
        *,
        cpu_s: float = 0.0,
        is_idle: bool = False,
        is_stopped: bool = False,
        after_s: float = 1.0,
    ) -> WorkerState:
        self.now_s += after_s
        self.cpu_s += cpu_s
        beat = None if progress is None else Heartbeat(progress=progress, is_idle=is_idle)
        return self.tracker.observe(
            Observation(now_s=self.now_s, heartbeat=beat, cpu_s=self.cpu_s, is_stopped=is_stopped)
        )

    def seconds_until_lost(self, progress: float | None, *, cpu_s: float = 0.0) -> int:
        seconds = 0
        while not self.tracker.is_lost:
            self.see(progress, cpu_s=cpu_s)
            seconds += 1
        return seconds


def test_progress_is_health() -> None:
    watched = Watched()
    assert {watched.see(n) for n in range(50)} == {WorkerState.READY}
    assert not watched.tracker.is_lost


def test_idle_needs_no_progress() -> None:
    watched = Watched()
    assert {watched.see(7, is_idle=True) for _ in range(50)} == {WorkerState.READY}


def test_one_lost_ping_is_nothing() -> None:
    watched = Watched()
    watched.see(1)
    assert watched.see(None) is WorkerState.READY


def test_silence_without_cpu_is_frozen_and_lost_after_the_freeze_timeout() -> None:
    watched = Watched()
    watched.see(1)
    assert [watched.see(None) for _ in range(3)][-1] is WorkerState.FROZEN
    assert watched.seconds_until_lost(None) == 10 - 3


def test_silence_with_cpu_is_busy_and_lost_after_the_busy_timeout() -> None:
    watched = Watched()
    watched.see(1)
    states = [watched.see(None, cpu_s=0.9) for _ in range(20)]
    assert states[3:] == [WorkerState.BUSY] * 17
    assert watched.seconds_until_lost(None, cpu_s=0.9) == 30 - 20


def test_answers_without_progress_are_busy_and_lost_after_the_busy_timeout() -> None:
    watched = Watched()
    watched.see(1)
    assert [watched.see(1) for _ in range(20)][-1] is WorkerState.BUSY
    assert watched.seconds_until_lost(1) == 30 - 20


def test_stopped_is_frozen_whatever_it_used_before() -> None:
    watched = Watched()
    watched.see(1, cpu_s=1.0)
    states = [watched.see(None, is_stopped=True) for _ in range(3)]
    assert states[-1] is WorkerState.FROZEN


def test_recovery() -> None:
    watched = Watched()
    for _ in range(9):
        watched.see(None)
    assert watched.see(2) is WorkerState.READY
    assert watched.seconds_until_lost(None) == 10


def test_the_observers_own_absence_is_not_held_against_the_worker() -> None:
    watched = Watched()
    watched.see(1)
    assert watched.see(None, after_s=1000.0) is WorkerState.READY
    assert not watched.tracker.is_lost
    assert watched.see(2) is WorkerState.READY
