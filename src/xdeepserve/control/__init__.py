"""Control: framed messages between our processes on one host, over unix sockets.

One socket per process. A server answers calls with one message or a stream of them; a client calls
with deadlines. Messages are tagged msgspec structs that the rooms above define; no pickle.
"""

from __future__ import annotations

from xdeepserve.control.client import ControlClient
from xdeepserve.control.envelope import RemoteError, to_local, to_remote
from xdeepserve.control.framing import DEFAULT_MAX_FRAME_BYTES
from xdeepserve.control.server import ControlServer
from xdeepserve.control.unix_socket import Peer, check_socket_path

__all__ = [
    "DEFAULT_MAX_FRAME_BYTES",
    "ControlClient",
    "ControlServer",
    "Peer",
    "RemoteError",
    "check_socket_path",
    "to_local",
    "to_remote",
]
