"""FileLock: one process at a time does a job, the others wait with a deadline."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.errors import ConfigError, DeadlineExceeded

_POLL_S: Final = 0.05


@contextmanager
def file_lock(path: Path, *, timeout_s: float, clock: Clock = SYSTEM_CLOCK) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if missing; left there afterwards).

    The kernel drops the lock when the holder dies, so there are no stale locks.

    Raises:
        DeadlineExceeded: another process held it for all of `timeout_s`.
        ConfigError: the folder cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise ConfigError(
            f"{path} cannot be written: {exc.strerror or exc}; set XDEEPSERVE_HOME to a "
            "folder that can"
        ) from exc
    try:
        deadline = clock.monotonic() + timeout_s
        while not _try_lock(descriptor):
            if clock.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"{path} was held by another process for more than {timeout_s:g} s; "
                    "wait for it to finish or stop it"
                )
            time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
