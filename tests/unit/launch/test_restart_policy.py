"""Back-off: doubling waits, a ceiling, the crash-loop limit and the sliding window."""

from __future__ import annotations

from xdeepserve.launch.deployment import SupervisionConfig
from xdeepserve.launch.supervisor.restart_policy import RestartPolicy

CONFIG = SupervisionConfig(
    backoff_initial_s=1.0, backoff_max_s=5.0, crash_loop_limit=5, crash_loop_window_s=100.0
)


def test_waits_double_up_to_a_ceiling_then_it_gives_up() -> None:
    policy = RestartPolicy(CONFIG)
    assert [policy.next_wait_s(now) for now in range(4)] == [1.0, 2.0, 4.0, 5.0]
    assert not policy.has_given_up
    assert [policy.next_wait_s(now) for now in (4, 5)] == [None, None]
    assert policy.has_given_up


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
    assert policy.num_crashes == 0
    assert policy.next_wait_s(6.0) == 1.0


def test_it_goes_on_from_what_another_supervisor_has_counted() -> None:
    policy = RestartPolicy(CONFIG, num_crashes=3, now_s=50.0)
    assert (policy.num_crashes, policy.wait_s) == (3, 4.0)
    assert [policy.next_wait_s(now) for now in (51.0, 52.0)] == [5.0, None]
    assert RestartPolicy(CONFIG, num_crashes=9, now_s=50.0).has_given_up
