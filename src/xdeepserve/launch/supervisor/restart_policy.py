"""RestartPolicy: how long to wait before a worker is started again, and when to give up."""

from __future__ import annotations

from collections import deque

from xdeepserve.launch.deployment import SupervisionConfig


class RestartPolicy:
    """Exponential back-off over the crashes of one worker within a sliding window."""

    def __init__(self, config: SupervisionConfig) -> None:
        self._config = config
        self._crashes: deque[float] = deque(maxlen=config.crash_loop_limit)

    def next_wait_s(self, now_s: float) -> float | None:
        """Count a crash.

        Args:
            now_s: monotonic time of the crash.

        Returns:
            Seconds to wait before the next start; None when the crash-loop limit is reached.
        """
        window_start_s = now_s - self._config.crash_loop_window_s
        while self._crashes and self._crashes[0] < window_start_s:
            self._crashes.popleft()
        self._crashes.append(now_s)
        num_crashes = len(self._crashes)
        if num_crashes >= self._config.crash_loop_limit:
            return None
        wait_s: float = self._config.backoff_initial_s * 2.0 ** (num_crashes - 1)
        return min(wait_s, self._config.backoff_max_s)

    def forget(self) -> None:
        """Forgive all crashes so far."""
        self._crashes.clear()
