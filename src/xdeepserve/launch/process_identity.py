"""ProcessIdentity: a process by pid and start time, safe against reuse of the pid."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from xdeepserve.errors import IntegrityError

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_BOOT_TIME_KEY: Final = "btime "
"""Of /proc/stat: when this machine was booted, in seconds since the Unix epoch."""

_STATE, _UTIME, _STIME, _START_TIME = 0, 11, 12, 19
"""Fields of /proc/PID/stat, counted from the one behind the name; proc(5)."""


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One look at /proc/PID/stat.

    Attributes:
        start_time: clock ticks after boot.
        cpu_s: CPU seconds of all its threads since its start.
        is_stopped: by SIGSTOP or a debugger.
        is_dead: ended, but not reaped by its parent.
    """

    start_time: int
    cpu_s: float
    is_stopped: bool
    is_dead: bool


def sample_process(pid: int) -> ProcessSample | None:
    """Look at a process; None when there is none with this pid."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name is in parentheses and may contain anything, parentheses included.
    fields = text.rpartition(")")[2].split()
    return ProcessSample(
        start_time=int(fields[_START_TIME]),
        cpu_s=(int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS_PER_S,
        is_stopped=fields[_STATE] in "Tt",
        is_dead=fields[_STATE] in "ZX",
    )


def _boot_time_s() -> int:
    lines = Path("/proc/stat").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(_BOOT_TIME_KEY))


class ProcessIdentity(msgspec.Struct, frozen=True):
    """One process of this boot; equal only to itself, also after its pid is reused."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """The process that has this pid now.

        Raises:
            IntegrityError: there is none.
        """
        sample = sample_process(pid)
        if sample is None:
            raise IntegrityError(f"process {pid} is gone before it was seen")
        return cls(pid, sample.start_time)

    @classmethod
    def own(cls) -> ProcessIdentity:
        """This process."""
        return cls.of(os.getpid())

    @property
    def started_at_s(self) -> float:
        """Wall clock of its start, to the second."""
        return _boot_time_s() + self.start_time / _TICKS_PER_S

    def is_alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        sample = sample_process(self.pid)
        return sample is not None and sample.start_time == self.start_time and not sample.is_dead

    def open_pidfd(self) -> int | None:
        """A descriptor that becomes readable when it ends; None when it has ended already."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return None
        # Checked after opening: from now on the descriptor cannot mean another process.
        if self.is_alive():
            return pidfd
        os.close(pidfd)
        return None

    def kill(self, number: signal.Signals) -> None:
        """Send a signal; does nothing when it has ended."""
        pidfd = self.open_pidfd()
        if pidfd is not None:
            send_signal(pidfd, number)
            os.close(pidfd)


def send_signal(pidfd: int, number: signal.Signals) -> None:
    """Send a signal to the process of a pidfd; does nothing when it has ended."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)
