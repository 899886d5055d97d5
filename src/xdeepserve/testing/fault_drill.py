"""Fault drills: do harm to a living service under load, and look whether a client can tell.

    undisturbed run --> texts, longest gap
    drill: streams decode --> harm --> streams end --> service settled --> DrillResult

Equal texts, no failed stream, and how long the longest silence of a client was.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.errors import EngineDeadError
from xdeepserve.launch.supervisor.messages import Status
from xdeepserve.testing.live_service import LiveRun, LiveService, count_in, process_in
from xdeepserve.testing.watched_streams import (
    StreamRecord,
    WatchedLoad,
    WatchedRequest,
    longest_gap_s,
    watched_requests,
)

BEGUN_CHUNKS: Final = 4
"""Every stream has so many when the harm is done: all are decoding."""

Harm = Callable[[LiveRun], Awaitable[None]]
"""Does harm, and returns when the service has settled again."""


def kill_worker(name: str) -> Harm:
    """SIGKILL to a worker, or to "supervisor"."""

    async def harm(service: LiveRun) -> None:
        process = await service.process_of(name)
        process.kill(signal.SIGKILL)
        await service.until_replaced(name, process)

    return harm


def freeze_worker(name: str) -> Harm:
    """SIGSTOP to a worker, for longer than the supervisor bears it."""

    async def harm(service: LiveRun) -> None:
        process = await service.process_of(name)
        process.kill(signal.SIGSTOP)
        await service.until_replaced(name, process)

    return harm


def thaw_worker(name: str, frozen_s: float) -> Harm:
    """SIGSTOP to an FFN or expert worker, SIGCONT after `frozen_s`: the same life must go on.

    It has settled when the worker serves again and an answer that it owed since before was dropped.

    Raises:
        EngineDeadError: the worker was replaced.
    """

    async def harm(service: LiveRun) -> None:
        process, before = await service.process_of(name), await service.status()
        process.kill(signal.SIGSTOP)
        await asyncio.sleep(frozen_s)
        frozen = await service.status()
        process.kill(signal.SIGCONT)

        def is_back(status: Status) -> bool:
            if process_in(status, name) != process:
                raise EngineDeadError(f"{name} was replaced instead of being welcomed back")
            serves = count_in(status, "requests", name) > count_in(frozen, "requests", name)
            has_dropped = count_in(status, "late_answers") > count_in(before, "late_answers")
            return serves and has_dropped and status.membership.is_settled()

        await service.until(is_back)

    return harm


def scale_through(role: str, counts: Sequence[int]) -> Harm:
    """`xds scale` to each of the counts in turn."""

    async def harm(service: LiveRun) -> None:
        for count in counts:
            await service.scale({role: count})

    return harm


async def steady_requests(
    service: LiveService, count: int, max_tokens: int
) -> list[WatchedRequest]:
    """Requests of which each token gives a chunk: silence is then the service's, not the text's.

    A token that ends within a character is held back until the next one; a tenth of the answers
    of a small model has such tokens. So some more are tried, and those with most chunks are taken.
    """
    candidates = watched_requests(count + count // 4 + 1, max_tokens)
    server = service.server
    async with WatchedLoad(server.url, server.model, candidates) as load:
        records = await load.finish()
    num_chunks = [len(answers[0].arrivals_s) for answers in records]
    best = sorted(range(len(candidates)), key=lambda idx: -num_chunks[idx])[:count]
    return [candidates[idx] for idx in sorted(best)]


@dataclass(frozen=True, slots=True)
class DrillResult:
    """What the clients saw of one drill.

    Attributes:
        num_answers: by all clients.
        errors: what failed or hung, and how often.
        num_different: whole answers that are not the undisturbed ones.
        gap_s: longest silence within an answer after the harm began.
        settled_s: from the harm until the service had settled.
    """

    num_answers: int
    errors: Counter[str]
    num_different: int
    gap_s: float
    settled_s: float

    @property
    def is_clean(self) -> bool:
        """Whether no client could tell by the answers."""
        return not self.errors and not self.num_different


class Drills:
    """Drills on one service, all with the same requests."""

    def __init__(self, service: LiveService, requests: Sequence[WatchedRequest]) -> None:
        self._service = service
        self._requests = requests
        self._expected: list[StreamRecord] = []

    async def undisturbed(self, harm_s: float = 0.0) -> DrillResult:
        """Take note of the answers to the requests; a second call compares with the first.

        Args:
            harm_s: let the clients repeat their requests for so long; 0 = one request each.
        """

        async def wait(service: LiveRun) -> None:
            await asyncio.sleep(harm_s)

        return await self.drill(wait, repeats=harm_s > 0)

    async def drill(self, harm: Harm, *, repeats: bool = False) -> DrillResult:
        """Run the requests, do harm while all are decoding, wait for the last answer.

        Args:
            harm: what is done.
            repeats: keep up the load until the harm is done; else one request per client.

        Raises:
            XDeepServeError: the service did not settle.
        """
        server = self._service.server
        async with WatchedLoad(server.url, server.model, self._requests, repeats=repeats) as load:
            begun_s = await load.until_all_have(BEGUN_CHUNKS)
            await harm(self._service)
            settled_s = SYSTEM_CLOCK.monotonic() - begun_s
            records = await load.finish()
        return self._judge(records, begun_s, settled_s)

    def _judge(
        self, records: list[list[StreamRecord]], begun_s: float, settled_s: float
    ) -> DrillResult:
        """Compare with the first run, which is this one if there was none."""
        self._expected = self._expected or [answers[0] for answers in records]
        answers = [record for client in records for record in client]
        different = [
            record
            for expected, client in zip(self._expected, records, strict=True)
            for record in client
            if record.error is None and not _equal(record, expected)
        ]
        return DrillResult(
            num_answers=len(answers),
            errors=Counter(record.error for record in answers if record.error is not None),
            num_different=len(different),
            gap_s=longest_gap_s(records, begun_s),
            settled_s=settled_s,
        )


def _equal(one: StreamRecord, other: StreamRecord) -> bool:
    return (one.text, one.num_tokens) == (other.text, other.num_tokens)
