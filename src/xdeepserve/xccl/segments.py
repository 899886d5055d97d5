"""The segments in /dev/shm: listing and cleaning by run id, and what dead runs left behind.

Only files of this user with mode 0600 that are named like ours are looked at or removed.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xdeepserve import _xccl
from xdeepserve.errors import SegmentError

SHM_FOLDER = Path("/dev/shm")
NEWBORN_S = 10.0
"""A segment without its final name that is older than this was left by a crash."""

_NAME = re.compile(r"xds-([A-Za-z0-9_.]+)-([A-Za-z0-9_.-]+)(~[0-9]+)?")


@dataclass(frozen=True, slots=True)
class SegmentInfo:
    """One segment file.

    Attributes:
        path: its file.
        run_id, name: of the rank that made it.
        num_bytes: size, untouched pages included.
        rank, pid, incarnation: of the owner; -1, 0 and 0 where the header is not readable.
        is_running: the owner's process runs and has not closed it.
    """

    path: Path
    run_id: str
    name: str
    num_bytes: int
    rank: int
    pid: int
    incarnation: int
    is_running: bool


def list_segments(run_id: str | None = None) -> list[SegmentInfo]:
    """Segments of one run, or of all runs of this user, by name. Changes nothing."""
    return sorted(_find(run_id), key=lambda info: info.path)


def unlink_all(run_id: str) -> list[Path]:
    """Removes the names of all segments of a run; returns them. Mappings stay valid.

    For whoever started the run and has ended its processes, or once all ranks are attached.
    """
    return [path for path in map(_unlink, list_segments(run_id)) if path is not None]


def leftovers() -> list[SegmentInfo]:
    """Segments whose owner no longer runs: what a crash left. Safe to unlink."""
    return [info for info in list_segments() if not info.is_running]


def _unlink(info: SegmentInfo) -> Path | None:
    try:
        info.path.unlink()
    except FileNotFoundError:
        return None
    return info.path


def _find(run_id: str | None) -> Iterator[SegmentInfo]:
    try:
        entries = list(os.scandir(SHM_FOLDER))
    except OSError:
        return
    for entry in entries:
        match = _NAME.fullmatch(entry.name)
        if match is None or run_id not in (None, match[1]):
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue
        if _is_ours(status):
            yield _describe(Path(entry.path), match, status)


def _is_ours(status: os.stat_result) -> bool:
    is_private = stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600
    return is_private and status.st_uid == os.geteuid()


def _describe(path: Path, match: re.Match[str], status: os.stat_result) -> SegmentInfo:
    run_id, name, unborn = match.groups()
    is_young = time.time() - status.st_mtime < NEWBORN_S
    unknown = SegmentInfo(path, run_id, name, status.st_size, -1, 0, 0, is_young)
    if unborn is not None:
        return unknown
    try:
        blob = _xccl.read_blob(run_id, name)
        _, _, rank, pid, incarnation, num_bytes = _xccl.describe_blob(blob)
        is_running = _xccl.is_running(blob)
    except SegmentError:
        return unknown
    return SegmentInfo(path, run_id, name, num_bytes, rank, pid, incarnation, is_running)
