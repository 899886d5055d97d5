"""resolve: a deployment and the shape of its model -> one WorkerSpec per worker.

Pure. The supervisor resolves again when the service is scaled.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Final

import msgspec

from xdeepserve.errors import ConfigError
from xdeepserve.flowserve.build import check_speculation
from xdeepserve.launch.deployment import ROLES, Deployment, Slices

NAME_PREFIX: Final = {"attention": "dp", "ffn": "ffn", "expert": "expert"}
"""Role -> what its workers are called: dp0, ffn0, expert0."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment must know of a model.

    Attributes:
        name: for messages.
        num_experts: routed experts per MoE layer; 0 = a dense model.
        has_ffn: some layer has a dense MLP or shared experts.
        num_layers: layers.
        hidden_size: width of the rows that workers exchange.
        top_k: routed experts per token; 0 = a dense model.
        has_mtp: it carries a layer for multi-token prediction.
    """

    name: str
    num_experts: int
    has_ffn: bool
    num_layers: int
    hidden_size: int
    top_k: int
    has_mtp: bool = False


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One worker process.

    Attributes:
        name: unique in the run, for example "expert1"; also of its socket and lock file.
        role: one of ROLES.
        rank: from 0 within the role.
        cores: it may run on these alone; empty = on any.
        experts: [start, stop) of the experts it serves first; None for other roles.
    """

    name: str
    role: str
    rank: int
    cores: tuple[int, ...] = ()
    experts: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        """What `ps` shows."""
        return f"xds:{self.name}"


class ResolvedPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All workers of a deployment, by role and rank."""

    workers: tuple[WorkerSpec, ...]

    def counts(self) -> dict[str, int]:
        """Workers per role."""
        return {role: sum(worker.role == role for worker in self.workers) for role in ROLES}


def worker_name(role: str, rank: int) -> str:
    """Name of a worker: dp0, ffn1, expert2."""
    return f"{NAME_PREFIX[role]}{rank}"


def counts_of(names: Collection[str]) -> dict[str, int]:
    """How many workers of each role there must be for these to be among them: highest rank + 1.

    Roles without any are left out, and so are names that are no worker's.
    """
    counts: dict[str, int] = {}
    for role, prefix in NAME_PREFIX.items():
        ranks = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if found := [int(rank) for rank in ranks if rank.isascii() and rank.isdecimal()]:
            counts[role] = 1 + max(found)
    return counts


def resolve(
    deployment: Deployment, shape: ModelShape, *, usable_cores: Collection[int]
) -> ResolvedPlan:
    """The workers of `deployment` for a model of this shape.

    Args:
        usable_cores: cores that workers may be pinned to.

    Raises:
        ConfigError: a role the model has no use for, slices that leave experts out, more workers
            than experts, cores that are not there.
    """
    _check_roles(deployment, shape)
    check_speculation(deployment.limits, shape.name, has_mtp=shape.has_mtp)
    slices = expert_slices(deployment, shape)
    workers = []
    for role in ROLES:
        spec = deployment.role(role)
        for rank in range(spec.count):
            cores = spec.cores[rank] if rank < len(spec.cores) else ()
            _check_cores(cores, usable_cores, f"roles.{role}.cores[{rank}]")
            workers.append(
                WorkerSpec(
                    name=worker_name(role, rank),
                    role=role,
                    rank=rank,
                    cores=cores,
                    experts=slices[rank] if role == "expert" else None,
                )
            )
    return ResolvedPlan(workers=tuple(workers))


def _check_roles(deployment: Deployment, shape: ModelShape) -> None:
    roles = deployment.roles
    if roles.expert.count and not shape.num_experts:
        raise ConfigError(
            f"roles.expert.count={roles.expert.count}, but {shape.name} is a dense model without "
            "routed experts; use 0 expert workers (FFN workers can take its MLPs)"
        )
    if roles.ffn.count and not shape.has_ffn:
        raise ConfigError(
            f"roles.ffn.count={roles.ffn.count}, but every layer of {shape.name} is made of "
            "routed experts alone: no dense MLP, no shared experts; use 0 FFN workers"
        )


def _check_cores(cores: tuple[int, ...], usable: Collection[int], where: str) -> None:
    missing = sorted(set(cores) - set(usable))
    if missing:
        raise ConfigError(
            f"{where} names cores {missing} that this process may not use; "
            f"usable are {sorted(usable)}"
        )


def expert_slices(deployment: Deployment, shape: ModelShape) -> Slices:
    """Experts of each expert worker: as given, or an even split.

    Raises:
        ConfigError: slices leave experts out or go beyond them, or there are too many workers or
            replicas.
    """
    spec, num_experts = deployment.roles.expert, shape.num_experts
    if not spec.count:
        return ()
    if spec.count > num_experts:
        raise ConfigError(
            f"roles.expert.count={spec.count} exceeds the {num_experts} experts of {shape.name}; "
            "a worker needs at least one"
        )
    slices = spec.slices or even_slices(num_experts, spec.count)
    _check_slices(slices, num_experts)
    largest = max(stop - start for start, stop in slices)
    if largest + spec.replicas > num_experts:
        raise ConfigError(
            f"roles.expert.replicas={spec.replicas} besides a slice of {largest} exceeds the "
            f"{num_experts} experts of {shape.name}"
        )
    return slices


def _check_slices(slices: Slices, num_experts: int) -> None:
    covered: set[int] = set()
    for rank, (start, stop) in enumerate(slices):
        if stop > num_experts:
            raise ConfigError(
                f"roles.expert.slices[{rank}]=[{start}, {stop}] goes beyond the {num_experts} "
                "experts of the model"
            )
        covered.update(range(start, stop))
    if missing := sorted(set(range(num_experts)) - covered):
        raise ConfigError(f"roles.expert.slices leave out experts {missing}")


def even_slices(num_experts: int, num_workers: int) -> Slices:
    """[start, stop) per worker; sizes differ by at most one."""
    bounds = [-(-num_experts * rank // num_workers) for rank in range(num_workers + 1)]
    return tuple(pairwise(bounds))
