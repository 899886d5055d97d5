"""What the supervisor knows and tells: membership, and the requests its socket understands."""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from xdeepserve.eplb import ExpertLoadReport
from xdeepserve.errors import EngineDeadError
from xdeepserve.launch.placement import Placement
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.messages import Heartbeat

SUPERVISOR_NAME: Final = "supervisor"
"""Of its socket and lock file."""

MAX_HOTTEST: Final = 3
"""Experts of a layer that a LayerHeat names."""


class WorkerState(enum.StrEnum):
    """State of one worker; drawn in docs/design/supervisor.md."""

    STARTING = "starting"
    READY = "ready"
    BUSY = "busy"
    """Lives, but its loop makes no progress for a while: a long step, or waiting for others."""
    FROZEN = "frozen"
    """Stopped, or neither answers nor uses CPU; killed when it lasts."""
    DRAINING = "draining"
    """Takes nothing new and ends when its work is done."""
    BACKOFF = "backoff"
    """Ended; started again after a wait."""
    FAILED = "failed"
    """Crashed too often, and is tried again now and then; or cannot work as configured, and waits
    for the next `scale`."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One worker of a membership.

    Attributes:
        spec: which worker it is.
        state: see WorkerState.
        incarnation: counts its starts in this run, from 1; a higher one is another process.
        num_restarts: starts after a crash or kill.
        num_crashes: of these, what counts as a crash loop at present; at the limit it is FAILED.
        socket: where it offers its service.
        process: while it lives.
        started_at_s: wall clock of its latest start.
        reason: why it is not ready, or why its previous incarnation ended.
    """

    spec: WorkerSpec
    state: WorkerState
    incarnation: int
    num_restarts: int
    socket: str
    num_crashes: int = 0
    process: ProcessIdentity | None = None
    started_at_s: float = 0.0
    reason: str = ""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def can_serve(self) -> bool:
        """Whether new work may be sent to it."""
        return self.state in (WorkerState.READY, WorkerState.BUSY)


class Membership(msgspec.Struct, frozen=True, kw_only=True, tag="membership"):
    """All workers at one moment. A later one has a higher epoch, across supervisors too."""

    epoch: int
    run_id: str
    counts: dict[str, int]
    members: tuple[Member, ...]
    placement: Placement | None = None

    def find(self, name: str) -> Member | None:
        """The member of that name."""
        return next((member for member in self.members if member.name == name), None)

    def is_settled(self) -> bool:
        """Whether exactly the wanted workers are there and serve.

        Raises:
            EngineDeadError: a worker has FAILED.
        """
        for member in self.members:
            if member.state is WorkerState.FAILED:
                raise EngineDeadError(f"worker {member.name} does not start: {member.reason}")
        is_complete = len(self.members) == sum(self.counts.values())
        return is_complete and all(member.can_serve for member in self.members)


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of state.json: what the next supervisor must know.

    Attributes:
        membership: the latest.
        incarnations: latest of every worker that ever was, so that none is used twice.
    """

    membership: Membership
    incarnations: dict[str, int]


class Subscribe(msgspec.Struct, frozen=True, tag="subscribe"):
    """Answered with the current Membership and then each new one.

    A slow reader may miss some in between.
    """


class GetStatus(msgspec.Struct, frozen=True, tag="get_status"):
    """Answered with a Status."""


class Scale(msgspec.Struct, frozen=True, tag="scale"):
    """Run that many workers of each named role; answered with the Membership that begins it."""

    counts: dict[str, int]


class Rebalance(msgspec.Struct, frozen=True, tag="rebalance"):
    """Move the experts now; answered with the Membership once they have moved.

    Attributes:
        load: the load to place them for; None = the load counted.
    """

    load: ExpertLoadReport | None = None


class StopAll(msgspec.Struct, frozen=True, tag="stop_all"):
    """Drain and end all workers, then the supervisor, with exit code 0. Answered when begun."""

    drain_timeout_s: float


class HotExpert(msgspec.Struct, frozen=True, kw_only=True):
    """One of a layer's most wanted experts.

    Attributes:
        expert: its number.
        share: of the layer's tokens, 0 to 1.
        ranks: of the expert workers that hold a replica.
    """

    expert: int
    share: float
    ranks: tuple[int, ...]


class LayerHeat(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one layer spread.

    Attributes:
        layer_idx: which layer.
        num_tokens: counted of late, summed over experts; the latest count most.
        rank_ratios: rank of each expert worker in use -> its load over their mean.
        hottest: the experts with the largest shares, largest first; at most MAX_HOTTEST.
    """

    layer_idx: int
    num_tokens: int
    rank_ratios: dict[int, float]
    hottest: tuple[HotExpert, ...]


class ExpertHeat(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens spread over experts and expert workers.

    Attributes:
        num_tokens: counted of late, summed over layers and experts; the latest count most.
        peak_over_mean: load of the fullest worker over the mean, of all layers together; a layer
            waits for its fullest worker, so 1 is ideal.
        hottest: (layer, expert) with the largest share of its layer's tokens; None = no tokens.
        hottest_share: that share, 0 to 1.
        num_migrations: finished by this supervisor.
        num_moves: experts that it has moved, also in migrations that were cut short.
        is_migrating: whether one is under way.
        placement_epoch: of the placement in force.
        rank_ratios: rank of each expert worker in use -> its load over their mean, of all layers
            together; 1 without tokens.
        layers: those with tokens.
    """

    num_tokens: int
    peak_over_mean: float
    hottest: tuple[int, int] | None
    hottest_share: float
    num_migrations: int
    num_moves: int
    is_migrating: bool
    placement_epoch: int
    rank_ratios: dict[int, float] = {}
    layers: tuple[LayerHeat, ...] = ()


class Status(msgspec.Struct, frozen=True, kw_only=True, tag="status"):
    """Membership and what else an operator wants to know.

    Attributes:
        supervisor: its process.
        heartbeats: latest of each worker that has sent one, by name.
        expert_heat: None without expert workers.
        num_dropped: how often this supervisor gave the work of a FAILED worker to others.
    """

    membership: Membership
    supervisor: ProcessIdentity
    heartbeats: dict[str, Heartbeat]
    expert_heat: ExpertHeat | None = None
    num_dropped: int = 0


SupervisorRequest = Subscribe | GetStatus | Scale | Rebalance | StopAll
SupervisorReply = Membership | Status
