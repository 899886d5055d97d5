"""ExpertCalls: what the balancer asks of workers, through the connections of their slots."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

from xdeepserve.eplb import ExpertLoadReport
from xdeepserve.launch.plan import worker_name
from xdeepserve.launch.supervisor.worker_slot import WorkerSlot
from xdeepserve.launch.worker.messages import ExpertsLoaded, GetExpertLoad, LoadExperts

REPORT_TIMEOUT_S: Final = 0.5
LOAD_TIMEOUT_S: Final = 1.0


class ExpertCalls:
    """Asks the workers of `slots`, which the supervisor keeps up to date."""

    def __init__(self, slots: Mapping[str, WorkerSlot]) -> None:
        self._slots = slots

    async def reports(self) -> dict[str, ExpertLoadReport]:
        """Running totals of each DP group that answers, by its name and incarnation."""
        asked = {
            f"{slot.member.name} {slot.member.incarnation}": slot.ask(
                GetExpertLoad(), timeout_s=REPORT_TIMEOUT_S
            )
            for slot in self._slots.values()
            if slot.member.spec.role == "attention" and slot.member.can_serve
        }
        replies = await asyncio.gather(*asked.values())
        return {
            name: reply
            for name, reply in zip(asked, replies, strict=True)
            if isinstance(reply, ExpertLoadReport)
        }

    async def load(self, rank: int, experts: Sequence[tuple[int, int]]) -> bool:
        """Whether an expert worker has the weights of (layer, expert) present, in time."""
        slot = self._slots.get(worker_name("expert", rank))
        if slot is None:
            return False
        request = LoadExperts(tuple(experts))
        return isinstance(await slot.ask(request, timeout_s=LOAD_TIMEOUT_S), ExpertsLoaded)
