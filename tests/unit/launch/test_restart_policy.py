"""Back-off: doubling waits, a ceiling, the crash-loop limit and the sliding window."""

from __future__ import annotations

from xdeepserve.launch.deployment import SupervisionConfig
from xdeepserve.launch.supervisor.restart_policy import RestartPolicy

CONFIG = SupervisionConfig(
    backoff_initial_s=1.0, backoff_max_s=5.0, crash_loop_limit=5, crash_loop_window_s=100.0
)


def test_waits_double_up_to_a_ceiling_then_it_gives_up() -> None:
    policy = RestartPolicy(CONFIG)
    assert [policy.next_wait_s(now) for now in range(5)] == [1.0, 2.0, 4.0, 5.0, None]
    assert policy.next_wait_s(5.0) is None


def test_old_crashes_are_forgotten() -> None:
    policy = RestartPolicy(CONFIG)
    assert [policy.next_wait_s(now) for now in (0.0, 10.0, 20.0)] == [1.0, 2.0, 4.0]
    assert policy.next_wait_s(115.0) == 2.0
    assert policy.next_wait_s(1000.0) == 1.0


def test_forget() -> None:
    policy = RestartPolicy(CONFIG)
    for now in range(5):
        policy.next_wait_s(now)
    policy.forget()
    assert policy.next_wait_s(6.0) == 1.0
