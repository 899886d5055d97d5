"""Which body plays which role."""

from __future__ import annotations

from typing import Final

from xdeepserve.errors import ConfigError
from xdeepserve.launch.plan import ResolvedPlan

BODIES: Final = {
    "attention": "xdeepserve.launch.worker.dp_body:make_body",
    "ffn": "xdeepserve.launch.worker.module_body:make_body",
    "expert": "xdeepserve.launch.worker.module_body:make_body",
}
"""Role -> "module:function" that makes a WorkerBody of a WorkerContext."""


def bodies_for(plan: ResolvedPlan) -> dict[str, str]:
    """The bodies of all roles that have workers, or may get some by scaling.

    Raises:
        ConfigError: a role has workers but no body.
    """
    for role, count in plan.counts().items():
        if count and role not in BODIES:
            raise ConfigError(f"{count} workers of role {role} are asked for, but it has no body")
    return dict(BODIES)
