"""RunDirectory: where one running service keeps its lease, state, locks and sockets.

    xds-<run_id>/            mode 0700
      lease                  locked by the gateway for its whole life: the run lives as long
      service.json           what is served; written once by the gateway
      state.json             latest membership; written by the supervisor
      supervisor.lock, .sock
      dp0.lock, dp0.sock, dp0.ctl.sock        per worker: identity, its service, its supervision
      dp0.error                why it ended, if it could say

The kernel drops a lock when its holder dies, so nothing here can be stale in a harmful way. Shared
memory of a run is named /dev/shm/xds-<run_id>-*.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import struct
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Final

import msgspec

from xdeepserve import envs
from xdeepserve.control import check_socket_path
from xdeepserve.errors import CapacityError, ConfigError
from xdeepserve.launch.process_identity import ProcessIdentity

SHM_FOLDER: Final = Path("/dev/shm")

_FLOCK: Final = struct.Struct("hhqqi4x")
_WHOLE_FILE: Final = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
"""struct flock of fcntl(2). Open file description locks: asking who holds one takes none."""

_LONGEST_NAME: Final = "expert255"
"""Of a process: no role has a longer one, or more workers."""

_RUN_NAME: Final = re.compile(r"xds-([0-9a-f]{8})")
_RUN_MODE: Final = 0o700


def run_id_of(path: Path) -> str:
    """The run id in the name of a run directory; "" if it is not named like one."""
    named = _RUN_NAME.fullmatch(path.name)
    return "" if named is None else named.group(1)


def _is_private_folder(path: Path) -> bool:
    """Whether `path` itself, not what it may link to, is a folder that only this user can enter.

    In a shared temporary folder anybody can make a link of any name.
    """
    try:
        info = path.lstat()
    except OSError:
        return False
    # Not S_IMODE: a folder inherits the set-group-ID bit from the one that it is made in.
    is_private = info.st_uid == os.geteuid() and info.st_mode & 0o777 == _RUN_MODE
    return stat.S_ISDIR(info.st_mode) and is_private


def _is_own_file(path: Path) -> bool:
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid()


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The folder of one run and the names in it."""

    path: Path
    run_id: str

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The run directory at `path`.

        Raises:
            ConfigError: there is none, or it is a link, or others may enter or own it.
        """
        run_id = run_id_of(path)
        if not run_id or not _is_private_folder(path):
            raise ConfigError(
                f"{path} is no run directory: it must be a folder of this user (no link) named "
                "xds-<run id>, with mode 0700"
            )
        return cls(path, run_id)

    @property
    def lease_path(self) -> Path:
        return self.path / "lease"

    @property
    def service_path(self) -> Path:
        return self.path / "service.json"

    @property
    def state_path(self) -> Path:
        return self.path / "state.json"

    def socket_path(self, name: str) -> Path:
        """Where process `name` offers its service."""
        return self.path / f"{name}.sock"

    def control_path(self, name: str) -> Path:
        """Where worker `name` answers the supervisor."""
        return self.path / f"{name}.ctl.sock"

    def lock_path(self, name: str) -> Path:
        """Locked by the one process that is `name`."""
        return self.path / f"{name}.lock"

    def error_path(self, name: str) -> Path:
        """Where process `name` says why it ends; see failure_note.py."""
        return self.path / f"{name}.error"

    def gateway(self) -> ProcessIdentity | None:
        """The gateway that holds the lease; None when the run is dead."""
        return lock_holder(self.lease_path)

    def segment_path(self, name: str) -> Path:
        """Shared memory of worker `name`."""
        return SHM_FOLDER / f"xds-{self.run_id}-{name}"

    def shared_segments(self) -> list[Path]:
        """Shared-memory segments of this run; those of other users are not of this run."""
        named = SHM_FOLDER.glob(f"xds-{self.run_id}-*")
        return sorted(path for path in named if _is_own_file(path))

    def write(self, path: Path, message: msgspec.Struct) -> None:
        """Replace a JSON file of this run in one step; it is never empty or half written."""
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(message))
            file.flush()
            # Some file systems would rename first and find out later that the disk is full.
            os.fsync(file.fileno())
        temporary.rename(path)

    def lock_holders(self) -> dict[str, ProcessIdentity | None]:
        """By name, every process that ever was of this run, the gateway apart; None = it ended."""
        return {path.stem: lock_holder(path) for path in sorted(self.path.glob("*.lock"))}

    def kill_processes(self) -> None:
        """Kill the supervisor, then all workers."""
        # First who could start others.
        if (supervisor := lock_holder(self.lock_path("supervisor"))) is not None:
            supervisor.kill(signal.SIGKILL)
        for holder in self.lock_holders().values():
            if holder is not None:
                holder.kill(signal.SIGKILL)

    def remove(self) -> None:
        """Unlink the run's shared memory and this folder. Idempotent."""
        for segment in self.shared_segments():
            segment.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


class NameTaken(CapacityError):
    """Another process of this run holds the lock."""


class IdentityLock:
    """An exclusive lock on a file that names its holder; held until `release` or death."""

    def __init__(self, path: Path) -> None:
        """Take the lock without waiting.

        Raises:
            NameTaken: another process holds it.
        """
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except BlockingIOError:
            os.close(self._descriptor)
            raise NameTaken(f"{path} is held by another process") from None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, msgspec.json.encode(ProcessIdentity.own()), 0)

    def release(self) -> None:
        """Let go. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def lock_holder(path: Path) -> ProcessIdentity | None:
    """Who holds an IdentityLock; None when nobody does, or its holder is just taking it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _WHOLE_FILE)
        if _FLOCK.unpack(answer)[0] == fcntl.F_UNLCK:
            return None
        return msgspec.json.decode(os.pread(descriptor, 4096, 0), type=ProcessIdentity)
    except msgspec.DecodeError:
        return None
    finally:
        os.close(descriptor)


def create_run() -> tuple[RunDirectory, IdentityLock]:
    """A new run directory in XDEEPSERVE_RUN_DIR and its lease, held by this process.

    Raises:
        ConfigError: the folder cannot be written, or its path is too long for sockets in it.
    """
    base, run_id = envs.RUN_DIR.get(), secrets.token_hex(4)
    run = RunDirectory(base / f"xds-{run_id}", run_id)
    try:
        check_socket_path(run.control_path(_LONGEST_NAME))
    except ConfigError as exc:
        raise ConfigError(f"{exc.message} ({envs.RUN_DIR.name}={base})") from None
    draft = base / f".xds-{run_id}.new"
    try:
        draft.mkdir(mode=_RUN_MODE)
        lease = IdentityLock(draft / "lease")
        # Renamed when the lease is held: whoever looks for dead runs never sees it without.
        draft.rename(run.path)
    except OSError as exc:
        raise ConfigError(
            f"no run directory can be made in {base}: {exc.strerror or exc}; set "
            f"{envs.RUN_DIR.name} to a folder that can be written"
        ) from exc
    return run, lease


def find_runs() -> list[RunDirectory]:
    """Run directories of this user, living and dead, oldest first."""
    found = []
    for path in envs.RUN_DIR.get().glob("xds-*"):
        with contextlib.suppress(ConfigError, FileNotFoundError):  # Runs may end meanwhile.
            found.append((path.lstat().st_mtime_ns, path, RunDirectory.open(path)))
    return [run for _, _, run in sorted(found, key=itemgetter(0, 1))]


def living_runs() -> list[RunDirectory]:
    """Runs whose gateway is alive."""
    return [run for run in find_runs() if run.gateway() is not None]


def dead_runs() -> list[RunDirectory]:
    """Runs whose gateway is gone but whose folder is still there."""
    return [run for run in find_runs() if run.gateway() is None]


def clean_dead_runs() -> list[RunDirectory]:
    """Kill what is left of dead runs, unlink their shared memory, remove their folders."""
    dead = dead_runs()
    for run in dead:
        run.kill_processes()
        run.remove()
    return dead


def choose_run(run_id: str | None) -> RunDirectory:
    """The living run with this id, or the only one.

    Raises:
        ConfigError: there is none, or several and none was named.
    """
    runs = living_runs()
    ids = ", ".join(run.run_id for run in runs) or "none"
    if run_id is not None:
        for run in runs:
            if run.run_id == run_id:
                return run
        raise ConfigError(f"no service with run id {run_id!r} is running here; running: {ids}")
    if len(runs) != 1:
        reason = "no disaggregated service is running" if not runs else "several services run"
        raise ConfigError(f"{reason} here (running: {ids}); name one with --run-id")
    return runs[0]
