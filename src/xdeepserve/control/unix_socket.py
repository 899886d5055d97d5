"""Unix sockets that only their owner can reach: 0600 in a 0700 folder, peers checked by uid."""

from __future__ import annotations

import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xdeepserve.errors import ConfigError, ProtocolError

_MAX_PATH_BYTES: Final = 107
"""Longest path of a unix socket on Linux, without the closing zero."""

_CREDENTIALS: Final = struct.Struct("3i")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of one connection.

    Attributes:
        connection_id: unique within the server; two connections of a process differ.
        pid: process id when it connected.
        uid: its user; always our own.
    """

    connection_id: int
    pid: int
    uid: int


def bind_socket(path: Path) -> socket.socket:
    """A bound socket, mode 0600, that does not listen yet; replaces one left by a dead process.

    Raises:
        ConfigError: the path is too long, its folder is open to others, or somebody listens there.
    """
    _check_path(path)
    if path.exists() or path.is_symlink():
        _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        # Nobody can connect before listen(), so there is no moment with wider permissions.
        path.chmod(0o600)
    except OSError:
        listener.close()
        raise
    return listener


def check_socket_path(path: Path) -> None:
    """Whether a socket can have this path.

    Raises:
        ConfigError: it is too long.
    """
    length = len(os.fsencode(path))
    if length > _MAX_PATH_BYTES:
        raise ConfigError(
            f"the socket path {path} has {length} bytes, the limit is {_MAX_PATH_BYTES}; "
            "use a shorter run directory"
        )


def _check_path(path: Path) -> None:
    check_socket_path(path)
    folder = path.parent.stat()
    if folder.st_uid != os.geteuid() or stat.S_IMODE(folder.st_mode) & 0o077:
        raise ConfigError(
            f"the folder {path.parent} of a socket has mode {stat.S_IMODE(folder.st_mode):o} and "
            f"owner {folder.st_uid}; it must be ours with mode 700"
        )


def _remove_stale(path: Path) -> None:
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"{path} exists and is no socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # Somebody listens, with a full queue of connections.
    raise ConfigError(f"another process listens on {path}; stop it or choose another path")


def peer_of(sock: socket.socket, *, connection_id: int) -> Peer:
    """Who is at the other end, as the kernel knows it.

    Raises:
        ProtocolError: a process of another user.
    """
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise ProtocolError(f"process {pid} of user {uid} connected; only {os.geteuid()} may")
    return Peer(connection_id=connection_id, pid=pid, uid=uid)
