"""RestartPolicy: how long to wait before a worker is started again, and when to give up."""

from __future__ import annotations

from collections import deque

from xdeepserve.launch.deployment import SupervisionConfig


class RestartPolicy:
    """Exponential back-off over the crashes of one process within a sliding window."""

    def __init__(
        self, config: SupervisionConfig, *, num_crashes: int = 0, now_s: float = 0.0
    ) -> None:
        """Begin with crashes that were counted before, as if they were of now.

        Args:
            num_crashes: counted by another supervisor.
            now_s: monotonic time.
        """
        self._config = config
        self._crashes = deque([now_s] * num_crashes, maxlen=config.crash_loop_limit)

    @property
    def num_crashes(self) -> int:
        """Counted at present; at most the limit."""
        return len(self._crashes)

    @property
    def has_given_up(self) -> bool:
        """Whether the crash-loop limit is reached."""
        return len(self._crashes) >= self._config.crash_loop_limit

    @property
    def wait_s(self) -> float | None:
        """Seconds to wait before the next start; None when the crash-loop limit is reached."""
        if self.has_given_up:
            return None
        wait_s: float = self._config.backoff_initial_s * 2.0 ** max(0, len(self._crashes) - 1)
        return min(wait_s, self._config.backoff_max_s)

    def next_wait_s(self, now_s: float) -> float | None:
        """Count a crash.

        Args:
            now_s: monotonic time of the crash.

        Returns:
            See `wait_s`.
        """
        window_start_s = now_s - self._config.crash_loop_window_s
        while self._crashes and self._crashes[0] < window_start_s:
            self._crashes.popleft()
        self._crashes.append(now_s)
        return self.wait_s

    def forget(self) -> None:
        """Forgive all crashes so far."""
        self._crashes.clear()
