"""Fabric: the XCCL ranks and the segment layout of a run, equal for all its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xdeepserve import envs
from xdeepserve.errors import ConfigError, SegmentError
from xdeepserve.launch.deployment import ROLES, Deployment
from xdeepserve.launch.plan import ModelShape
from xdeepserve.xccl import Layout, Port

NUM_TRACED: Final = 256
"""Records that a worker keeps for itself; others read the headers in its segment."""


@dataclass(frozen=True, slots=True)
class Fabric:
    """Who is which rank. Fixed for the life of a run, so that workers can come and go.

    Attributes:
        run_id: names the segments.
        first_rank: XCCL rank of each role's worker 0.
        layout: sizes of the segments.
        frozen_after_s: silence after which a peer is bypassed.
    """

    run_id: str
    first_rank: dict[str, int]
    layout: Layout
    frozen_after_s: float

    @classmethod
    def of(cls, run_id: str, deployment: Deployment, shape: ModelShape) -> Fabric:
        """The fabric of a run, from what it was started with.

        Raises:
            ConfigError: a step is too large, or there are too many workers; see layout_of.
        """
        first_rank, num_ranks = {}, 0
        for role in ROLES:
            first_rank[role] = num_ranks
            num_ranks += deployment.role(role).capacity
        layout = layout_of(deployment, shape)
        return cls(run_id, first_rank, layout, deployment.supervision.bypass_after_s)

    def rank_of(self, role: str, rank: int) -> int:
        """XCCL rank of a worker."""
        return self.first_rank[role] + rank

    def open_port(self, name: str, role: str, rank: int) -> Port:
        """Make the worker's segment.

        Raises:
            SegmentError: /dev/shm has no room for it.
        """
        port = Port(
            self.run_id,
            name,
            self.rank_of(role, rank),
            layout=self.layout,
            frozen_after_s=self.frozen_after_s,
        )
        if envs.XCCL_TRACE.get() == "on":
            port.open_trace(NUM_TRACED)
        return port


def layout_of(deployment: Deployment, shape: ModelShape) -> Layout:
    """The segments of a run: places for all workers it may get, slots for one step of a group.

    Raises:
        ConfigError: a size is beyond what XCCL can exchange.
    """
    max_rows = deployment.limits.max_num_batched_tokens
    num_ranks = sum(deployment.role(role).capacity for role in ROLES)
    layout = Layout.for_rows(
        max_ranks=num_ranks,
        max_rows=max_rows,
        hidden_size=shape.hidden_size,
        top_k=max(shape.top_k, 1),
    )
    try:
        _ = layout.segment_bytes  # checks all sizes
    except SegmentError as exc:
        raise ConfigError(
            f"workers cannot exchange steps of this size: {exc.message}; lower "
            f"limits.max_num_batched_tokens={max_rows}, or the roles' max_count (places for "
            f"{num_ranks} workers)"
        ) from exc
    return layout


def is_taken_apart(deployment: Deployment) -> bool:
    """Whether the DP groups need others for a step."""
    return bool(deployment.roles.ffn.count or deployment.roles.expert.count)


def check_scaling(deployment: Deployment, counts: dict[str, int]) -> None:
    """Whether a run that was started as `deployment` can have these counts.

    Raises:
        ConfigError: a role has no room for so many, or would appear or vanish.
    """
    for role, count in counts.items():
        spec = deployment.role(role)
        if count > spec.capacity:
            raise ConfigError(
                f"{role}={count} exceeds the {spec.capacity} workers that this service has room "
                f"for; restart it with roles.{role}.max_count={count}"
            )
        if bool(count) != bool(spec.count):
            raise ConfigError(
                f"{role}={count}: the service was started with {spec.count}; a role cannot appear "
                "or vanish while it runs"
            )
