"""RouterMembers: keeps the router's DP groups in step with the membership of the cluster."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from xdeepserve.errors import ConfigError, EngineDeadError
from xdeepserve.flowserve.remote_engine import RemoteEngine
from xdeepserve.flowserve.router import RouterEngine
from xdeepserve.launch.background import Background
from xdeepserve.launch.supervisor.messages import Member

CONNECT_TIMEOUT_S: Final = 5.0

DRAIN_SHARE: Final = 0.8
"""Of a worker's drain time; then the router moves what is left to other groups."""


class RouterMembers:
    """A MemberListener. The router exists from the first DP group on."""

    def __init__(self, *, drain_timeout_s: float, background: Background) -> None:
        """Make a listener that knows no group.

        Args:
            drain_timeout_s: time a worker gets to finish its work.
            background: where drains run; its owner ends when one fails, and closes it.
        """
        self._router: RouterEngine | None = None
        self._drain_timeout_s = DRAIN_SHARE * drain_timeout_s
        self._background = background
        self._drains: dict[str, asyncio.Task[None]] = {}

    @property
    def router(self) -> RouterEngine:
        """The engine over all groups.

        Raises:
            EngineDeadError: no group has joined yet.
        """
        if self._router is None:
            raise EngineDeadError("no DP group has joined yet")
        return self._router

    async def joined(self, member: Member) -> None:
        """Connect to the group and route to it.

        Raises:
            ConfigError: it does not serve what the others serve.
            DeadlineExceeded: it does not answer.
        """
        engine = await RemoteEngine.connect(Path(member.socket), timeout_s=CONNECT_TIMEOUT_S)
        if self._router is None:
            self._router = RouterEngine(engine.info)
        try:
            self._router.add(member.name, engine)
        except ConfigError:
            await engine.close(drain_timeout_s=0.0)
            raise

    async def draining(self, member: Member) -> None:
        """Begin to move requests away; other members need not wait for that."""
        drain = self.router.drain(member.name, timeout_s=self._drain_timeout_s)
        self._drains[member.name] = self._background.start(drain, name=f"draining {member.name}")

    async def left(self, member: Member) -> None:
        """Forget the group."""
        if (drain := self._drains.pop(member.name, None)) is not None:
            drain.cancel()
            await asyncio.gather(drain, return_exceptions=True)
        await self.router.remove(member.name, drain_timeout_s=0.0)
