"""Deployment: which model is served by how many workers of each role, where and within what limits.

Frozen dataclasses; every field is documented here and becomes a key of the deployment file
(`deployment_file.py`). What depends on the model or the machine is checked by `plan.resolve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from xdeepserve.config import EngineConfig, GatewayConfig, ModelConfig, SloConfig, option
from xdeepserve.errors import ConfigError
from xdeepserve.transformerless.exchange_limit import EXCHANGE_TIMEOUT_S

ROLES: Final = ("attention", "ffn", "expert")
MAX_WORKERS_PER_ROLE: Final = 256
MIN_CAPACITY: Final = 4
MIN_BUSY_TIMEOUT_S: Final = 1.5 * EXCHANGE_TIMEOUT_S
"""With FFN or expert workers: what a silent one owes is computed after the exchange has ended."""

CoreLists = tuple[tuple[int, ...], ...]
Slices = tuple[tuple[int, int], ...]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """Workers of one role."""

    count: int = option(0, "Number of workers; 0 = the attention workers do this role's work.")
    max_count: int = option(
        0, "Most workers that scaling may reach; 0 = twice the count, at least 4."
    )
    cores: CoreLists = option((), "Cores of each worker, one list per rank; empty = not pinned.")

    @property
    def capacity(self) -> int:
        """Most workers of a run."""
        return self.max_count or min(max(2 * self.count, MIN_CAPACITY), MAX_WORKERS_PER_ROLE)

    def __post_init__(self) -> None:
        _require(
            0 <= self.count <= MAX_WORKERS_PER_ROLE,
            f"count={self.count} must be between 0 and {MAX_WORKERS_PER_ROLE}",
        )
        _require(
            self.max_count == 0 or self.count <= self.max_count <= MAX_WORKERS_PER_ROLE,
            f"max_count={self.max_count} must be 0, or from count={self.count} to "
            f"{MAX_WORKERS_PER_ROLE}",
        )
        for rank, cores in enumerate(self.cores):
            _require(
                bool(cores) and min(cores) >= 0 and len(set(cores)) == len(cores),
                f"cores[{rank}]={list(cores)} must name at least one core, none twice, none "
                "negative",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRoleSpec(RoleSpec):
    """DP groups: attention, scheduler, KV cache, and the work of roles that have no worker."""

    count: int = option(1, "Number of DP groups.")

    def __post_init__(self) -> None:
        # super() would look for the class that slots=True replaced.
        RoleSpec.__post_init__(self)
        _require(self.count >= 1, f"count={self.count} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRoleSpec(RoleSpec):
    """Expert workers: each holds a slice of the routed experts of all layers."""

    slices: Slices = option(
        (), "Experts of each worker as [start, stop), one per rank; empty = an even split."
    )
    replicas: int = option(0, "Redundant experts that each worker holds besides its slice.")
    rebalance_interval_s: float = option(
        10.0, "Time between two looks at the experts' load; 0 = they move for scaling only."
    )

    def __post_init__(self) -> None:
        RoleSpec.__post_init__(self)
        _require(
            math.isfinite(self.rebalance_interval_s) and self.rebalance_interval_s >= 0,
            f"rebalance_interval_s={self.rebalance_interval_s} must be finite and >= 0",
        )
        _require(self.replicas >= 0, f"replicas={self.replicas} must not be negative")
        _require(
            self.replicas == 0 or self.count >= 2,
            f"replicas={self.replicas} needs at least 2 expert workers, count={self.count}",
        )
        _require(
            len(self.slices) in (0, self.count),
            f"slices lists {len(self.slices)} workers, count={self.count}; give one per worker",
        )
        for rank, (start, stop) in enumerate(self.slices):
            _require(
                0 <= start < stop, f"slices[{rank}]=[{start}, {stop}] must be 0 <= start < stop"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RolesSpec:
    """The three roles of the model taken apart."""

    attention: AttentionRoleSpec = option(AttentionRoleSpec(), "DP groups.")
    ffn: RoleSpec = option(RoleSpec(), "Workers of dense layers and shared experts.")
    expert: ExpertRoleSpec = option(ExpertRoleSpec(), "Workers of routed experts.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisionConfig:
    """How workers are watched, restarted and stopped. Durations in seconds."""

    heartbeat_interval_s: float = option(0.25, "Time between two pings of a worker.")
    freeze_timeout_s: float = option(
        3.0, "A worker that neither answers nor uses CPU for this long is killed."
    )
    bypass_after_s: float = option(
        0.5, "An FFN or expert worker without a sign of life for so long is gone round."
    )
    busy_timeout_s: float = option(
        60.0,
        "A worker that lives but makes no progress for this long is killed. At least 30 with FFN "
        "or expert workers: a group may wait 20 s for one.",
    )
    start_timeout_s: float = option(300.0, "A worker that is not ready after this long is killed.")
    drain_timeout_s: float = option(30.0, "Time a worker gets to finish its work before SIGTERM.")
    stop_timeout_s: float = option(5.0, "Time between SIGTERM and SIGKILL.")
    backoff_initial_s: float = option(0.05, "Wait before the first restart; doubles each time.")
    backoff_max_s: float = option(10.0, "Longest wait before a restart.")
    crash_loop_limit: int = option(8, "Crashes within the window after which a worker is failed.")
    crash_loop_window_s: float = option(120.0, "Window of the crash-loop limit.")
    stable_after_s: float = option(
        30.0, "A worker that is ready for this long without a break has left its crashes behind."
    )
    failed_retry_s: float = option(
        60.0, "Time between two tries of a worker that failed by its crashes."
    )

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value > 0, f"{name}={value} must be finite and above 0"
            )
        _require(
            self.freeze_timeout_s >= 2 * self.heartbeat_interval_s,
            f"freeze_timeout_s={self.freeze_timeout_s} must be at least twice "
            f"heartbeat_interval_s={self.heartbeat_interval_s}, or one lost ping kills a worker",
        )
        _require(
            self.busy_timeout_s >= 2 * self.heartbeat_interval_s,
            f"busy_timeout_s={self.busy_timeout_s} must be at least twice "
            f"heartbeat_interval_s={self.heartbeat_interval_s}, or working workers are killed",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Everything that `xds serve` needs to know; the root of the deployment file."""

    model: str = option("", "A name (`xds models list`), a folder or a .gguf file.")
    precision: ModelConfig = option(ModelConfig(), "Weight precision and operator threads.")
    roles: RolesSpec = option(RolesSpec(), "Workers by role.")
    pin: bool = option(
        True, "Give each worker cores of its own, if no role names any and there are enough."
    )
    limits: EngineConfig = option(EngineConfig(), "Limits of each DP group.")
    gateway: GatewayConfig = option(GatewayConfig(), "The HTTP edge.")
    slo: SloConfig = option(SloConfig(), "Service-level objectives.")
    supervision: SupervisionConfig = option(SupervisionConfig(), "Watching and restarting.")

    def __post_init__(self) -> None:
        busy_timeout_s, others = self.supervision.busy_timeout_s, self.counts()
        del others["attention"]
        _require(
            busy_timeout_s >= MIN_BUSY_TIMEOUT_S or not any(others.values()),
            f"supervision: busy_timeout_s={busy_timeout_s} must be at least "
            f"{MIN_BUSY_TIMEOUT_S:g} with FFN or expert workers: a DP group may wait "
            f"{EXCHANGE_TIMEOUT_S:g} s for one of them before it goes on without it",
        )

    def role(self, name: str) -> RoleSpec:
        """The spec of one of ROLES.

        Raises:
            ConfigError: there is no such role.
        """
        if name not in ROLES:
            raise ConfigError(f"role {name!r} is unknown; roles are {', '.join(ROLES)}")
        spec: RoleSpec = getattr(self.roles, name)
        return spec

    def counts(self) -> dict[str, int]:
        """Workers by role."""
        return {name: self.role(name).count for name in ROLES}

    def with_counts(self, counts: Mapping[str, int]) -> Deployment:
        """This deployment with other worker counts.

        Expert slices are for one count; under another one the experts are split evenly, and the
        replicas that a single worker cannot hold are dropped.

        Raises:
            ConfigError: unknown role or a count out of range.
        """
        roles = self.roles
        for name, count in counts.items():
            spec = self.role(name)
            if spec.count == count:
                continue
            if isinstance(spec, ExpertRoleSpec):
                replicas = spec.replicas if count >= 2 else 0
                changed: Any = _in_role(name, spec, count=count, slices=(), replicas=replicas)
            else:
                changed = _in_role(name, spec, count=count)
            roles = replace(roles, **{name: changed})
        return replace(self, roles=roles)


def _in_role(name: str, spec: RoleSpec, **values: Any) -> RoleSpec:
    with naming_role(name):
        return replace(spec, **values)


@contextmanager
def naming_role(name: str) -> Iterator[None]:
    """What is wrong within the block is said of this role: `roles.expert: count=-1 ...`."""
    try:
        yield
    except ConfigError as exc:
        raise ConfigError(f"roles.{name}: {exc.message}") from exc
