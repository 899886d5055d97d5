"""What a worker's control socket understands."""

from __future__ import annotations

import msgspec

from xdeepserve.eplb import ExpertLoadReport
from xdeepserve.messages import Heartbeat


class GetHeartbeat(msgspec.Struct, frozen=True, tag="get_heartbeat"):
    """Answered with a HeartbeatReply."""


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take nothing new, finish what is under way within `timeout_s`, then end."""

    timeout_s: float


class GetExpertLoad(msgspec.Struct, frozen=True, tag="get_expert_load"):
    """Answered by a DP group with the ExpertLoadReport of all that it has counted."""


class LoadExperts(msgspec.Struct, frozen=True, tag="load_experts"):
    """Make the weights of these (layer, expert) present; answered with ExpertsLoaded."""

    experts: tuple[tuple[int, int], ...]


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


class ExpertsLoaded(msgspec.Struct, frozen=True, tag="experts_loaded"):
    """The weights are in memory, `num_bytes` of them."""

    num_bytes: int


WorkerRequest = GetHeartbeat | Drain | GetExpertLoad | LoadExperts
WorkerReply = HeartbeatReply | Drained | ExpertLoadReport | ExpertsLoaded
