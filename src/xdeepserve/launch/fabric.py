"""Fabric: the XCCL ranks and the segment layout of a run, equal for all its workers."""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.errors import ConfigError
from xdeepserve.launch.deployment import ROLES, Deployment
from xdeepserve.launch.plan import ModelShape
from xdeepserve.xccl import Layout, Port


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
        """The fabric of a run, from what it was started with."""
        first_rank, num_ranks = {}, 0
        for role in ROLES:
            first_rank[role] = num_ranks
            num_ranks += deployment.role(role).capacity
        layout = Layout.for_rows(
            max_ranks=num_ranks,
            max_rows=deployment.limits.max_num_batched_tokens,
            hidden_size=shape.hidden_size,
            top_k=max(shape.top_k, 1),
        )
        return cls(run_id, first_rank, layout, deployment.supervision.bypass_after_s)

    def rank_of(self, role: str, rank: int) -> int:
        """XCCL rank of a worker."""
        return self.first_rank[role] + rank

    def open_port(self, name: str, role: str, rank: int) -> Port:
        """Make the worker's segment.

        Raises:
            SegmentError: /dev/shm has no room for it.
        """
        return Port(
            self.run_id,
            name,
            self.rank_of(role, rank),
            layout=self.layout,
            frozen_after_s=self.frozen_after_s,
        )


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
