"""What a worker's control socket understands."""

from __future__ import annotations

import msgspec

from xdeepserve.messages import Heartbeat


class GetHeartbeat(msgspec.Struct, frozen=True, tag="get_heartbeat"):
    """Answered with a HeartbeatReply."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take nothing new, finish what is under way within `timeout_s`, then end."""

    timeout_s: float


class HeartbeatReply(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """State of a worker.

    Attributes:
        incarnation: as given at its start.
        is_ready: its body has started.
        heartbeat: of the body's loop; None until it is ready.
    """

    incarnation: int
    is_ready: bool
    heartbeat: Heartbeat | None


class Drained(msgspec.Struct, frozen=True, tag="drained"):
    """The drain is over; the process ends now."""


WorkerRequest = GetHeartbeat | Drain
WorkerReply = HeartbeatReply | Drained
