"""Child: how the end of a process is put into words."""

from __future__ import annotations

import signal
import subprocess

import pytest

from xdeepserve.launch.supervisor.child import describe_exit


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "ended"),
        (3, "ended with code 3"),
        (-signal.SIGKILL, "killed by SIGKILL"),
        (-35, "killed by signal 35"),
    ],
)
def test_every_end_has_words(code: int | None, words: str) -> None:
    assert describe_exit(code) == words


def test_a_process_may_end_by_a_signal_without_a_name() -> None:
    process = subprocess.Popen(["sleep", "3600"])
    process.send_signal(35)
    assert describe_exit(process.wait()) == "killed by signal 35"
