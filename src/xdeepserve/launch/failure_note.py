"""FailureNote: the last error of a process of a run, for whoever watches its end.

NAME.error in the run directory: the pid of its writer, and the message
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

import msgspec

from xdeepserve.errors import XDeepServeError
from xdeepserve.launch.run_dir import RunDirectory

MAX_MESSAGE_CHARS: Final = 1000


class FailureNote(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of the file.

    Attributes:
        pid: who wrote it; a note of an earlier process says nothing about the present one.
        message: why it ends.
    """

    pid: int
    message: str


def leave_note(run: RunDirectory, name: str, error: Exception) -> None:
    """Say why this process, the worker (or supervisor) `name`, is about to end."""
    if isinstance(error, XDeepServeError):
        message = error.message
    else:
        message = f"{type(error).__name__}: {error}"
    note = FailureNote(pid=os.getpid(), message=message[:MAX_MESSAGE_CHARS])
    # Without a note the reason is in the log alone; that must not hide the error itself.
    with contextlib.suppress(OSError):
        run.write(run.error_path(name), note)


def read_note(run: RunDirectory, name: str, pid: int) -> str:
    """What process `pid` said before it ended; "" if it said nothing."""
    try:
        note = msgspec.json.decode(run.error_path(name).read_bytes(), type=FailureNote)
    except (OSError, msgspec.DecodeError):
        return ""
    return note.message if note.pid == pid else ""
