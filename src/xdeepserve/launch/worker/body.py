"""WorkerBody: what a worker process computes, seen from the process around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol, runtime_checkable

from xdeepserve.config import ModelConfig
from xdeepserve.eplb import ExpertLoadReport
from xdeepserve.errors import ConfigError
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.launch.service import ServiceConfig
from xdeepserve.messages import Heartbeat


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """All that a body is told.

    Attributes:
        run: for the socket path of its own name and for names of shared segments.
        service: model and configuration.
        spec: which worker it is.
        incarnation: counts the starts of this worker in this run, from 1.
    """

    run: RunDirectory
    service: ServiceConfig
    spec: WorkerSpec
    incarnation: int

    def precision(self) -> ModelConfig:
        """How to load the model; unless told otherwise, workers share the cores evenly."""
        deployment = self.service.deployment
        if deployment.precision.num_threads or self.spec.cores:
            return deployment.precision
        num_workers = sum(deployment.counts().values())
        num_threads = max(1, len(os.sched_getaffinity(0)) // num_workers)
        return replace(deployment.precision, num_threads=num_threads)


class WorkerBody(Protocol):
    """All methods are called on the worker's event loop; none may block it."""

    async def start(self) -> None:
        """Load what is needed and start the loop; the worker counts as ready when this returns.

        Raises:
            XDeepServeError: the worker cannot work; its process ends.
        """
        ...

    def heartbeat(self) -> Heartbeat:
        """How the loop fares; called several times a second once it is ready."""
        ...

    async def drain(self, *, timeout_s: float) -> None:
        """Take nothing new; return when nothing is under way, or at the timeout."""
        ...

    async def close(self) -> None:
        """Stop the loop, free sockets and segments. Also called when `start` failed."""
        ...


@runtime_checkable
class CountsExperts(Protocol):
    """A WorkerBody that routes tokens to experts of other workers."""

    def expert_load(self) -> ExpertLoadReport:
        """Tokens by layer and expert since its start; callable before it is ready."""
        ...


@runtime_checkable
class HoldsExperts(Protocol):
    """A WorkerBody that computes experts."""

    async def load_experts(self, experts: Sequence[tuple[int, int]]) -> int:
        """Make the weights of (layer, expert) present beside its work; returns their bytes."""
        ...


BodyFactory = Callable[[WorkerContext], WorkerBody]


def load_body_factory(service: ServiceConfig, role: str) -> BodyFactory:
    """The factory of a role's body.

    Raises:
        ConfigError: this service has none for the role.
    """
    dotted = service.bodies.get(role)
    if dotted is None:
        raise ConfigError(f"no worker body is known for role {role!r}")
    module, _, name = dotted.partition(":")
    factory: BodyFactory = getattr(import_module(module), name)
    return factory
