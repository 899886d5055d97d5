"""Sends a workload, closed loop or open loop, and records the times of every request.

One `RequestRecord` per request, failed ones included: nothing is dropped. Only clocks and sockets
here; what the times mean is `metrics`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError
from xdeepserve.loadgen.openai_stream import UsageReport, stream_chunks
from xdeepserve.loadgen.workload import WorkloadRequest
from xdeepserve.telemetry import RequestTimeline

MAX_IN_FLIGHT: Final = 4096
"""Open-loop requests under way at once; arrivals beyond are recorded as failed."""


@dataclass(slots=True)
class RequestRecord:
    """What the client saw of one request; times are monotonic seconds of the client's clock.

    Attributes:
        timeline: arrival, first and last token, number of output tokens.
        output_len: the number of output tokens asked for.
        gaps_s: time between consecutive chunks with output (the ITL samples).
        ended_s: the answer's last byte, or the failure.
        usage: the server's token counts; None when it sent none, then chunks are counted.
        error: why it failed, or None.
        lag_s: how much later than due the request was sent (open loop).
    """

    timeline: RequestTimeline
    output_len: int
    gaps_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    usage: UsageReport | None = None
    error: str | None = None
    lag_s: float = 0.0

    @property
    def e2e_s(self) -> float:
        """Last byte minus arrival."""
        return self.ended_s - self.timeline.arrived_s


Send = Callable[[WorkloadRequest, float], Awaitable[RequestRecord]]
OnRecord = Callable[[RequestRecord], None]


@dataclass(frozen=True, slots=True)
class Limit:
    """When to stop sending: after so many requests, or seconds, whichever comes first."""

    num_requests: int | None = None
    duration_s: float | None = None

    def apply(self, requests: Iterator[WorkloadRequest]) -> Iterator[WorkloadRequest]:
        """The first `num_requests` of `requests`."""
        for count, request in enumerate(requests):
            if self.num_requests is not None and count >= self.num_requests:
                return
            yield request

    def is_over(self, elapsed_s: float) -> bool:
        return self.duration_s is not None and elapsed_s >= self.duration_s


class RequestSender:
    """Posts one request at a time per call and times its stream."""

    def __init__(self, client: HttpClient, clock: Clock = SYSTEM_CLOCK) -> None:
        self._client = client
        self._clock = clock

    async def send(self, request: WorkloadRequest, arrived_s: float) -> RequestRecord:
        """Send `request`, which was due at `arrived_s`; failures are in the record, not raised."""
        record = RequestRecord(RequestTimeline(arrived_s), request.output_len)
        record.lag_s = self._clock.monotonic() - arrived_s
        try:
            await self._consume(request, record)
        except ClientError as exc:
            record.error = exc.message
        record.ended_s = self._clock.monotonic()
        if record.usage is not None and record.usage.completion_tokens > 0:
            record.timeline.num_output_tokens = record.usage.completion_tokens
        if record.error is None and record.timeline.first_token_s is None:
            record.error = "the answer had no output"
        return record

    async def _consume(self, request: WorkloadRequest, record: RequestRecord) -> None:
        timeline = record.timeline
        stream = stream_chunks(self._client, request.path, request.body)
        async with contextlib.aclosing(stream) as batches:
            async for batch in batches:
                now = self._clock.monotonic()
                for chunk in batch:
                    if chunk.usage is not None:
                        record.usage = chunk.usage
                    if any(choice.has_token for choice in chunk.choices):
                        if timeline.last_token_s is not None:
                            record.gaps_s.append(now - timeline.last_token_s)
                        timeline.on_tokens(now_s=now, count=1)


async def run_closed_loop(
    send: Send,
    requests: Iterator[WorkloadRequest],
    *,
    concurrency: int,
    limit: Limit,
    on_record: OnRecord,
    clock: Clock = SYSTEM_CLOCK,
) -> list[RequestRecord]:
    """Keep `concurrency` requests under way until the limit; then wait for the last ones.

    Returns:
        One record per request, in order of completion.
    """
    records: list[RequestRecord] = []
    started_s = clock.monotonic()
    source = limit.apply(requests)

    async def client() -> None:
        while not limit.is_over(clock.monotonic() - started_s):
            request = next(source, None)
            if request is None:
                return
            record = await send(request, clock.monotonic())
            records.append(record)
            on_record(record)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return records


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Open-loop arrivals: gamma-distributed gaps with mean 1/rate.

    burstiness (the gamma's shape) 1 is a Poisson process; below 1 burstier, above 1 more even.
    """

    rate: float
    burstiness: float = 1.0
    seed: int = 0

    def gaps(self) -> Iterator[float]:
        """Seconds between arrivals."""
        rng = random.Random(self.seed)
        while True:
            yield rng.gammavariate(self.burstiness, 1.0 / (self.rate * self.burstiness))


async def run_open_loop(
    send: Send,
    requests: Iterator[WorkloadRequest],
    *,
    arrivals: Arrivals,
    limit: Limit,
    on_record: OnRecord,
    clock: Clock = SYSTEM_CLOCK,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[RequestRecord]:
    """Send requests at their arrival times, whatever the server does; then wait for the last ones.

    A request's times count from when it was due, so a client or server that falls behind shows in
    the latencies instead of thinning the load.
    """
    records: list[RequestRecord] = []
    started_s = due_s = clock.monotonic()

    def finish(record: RequestRecord) -> None:
        records.append(record)
        on_record(record)

    async def one(request: WorkloadRequest, arrived_s: float) -> None:
        finish(await send(request, arrived_s))

    in_flight: set[asyncio.Task[None]] = set()
    async with asyncio.TaskGroup() as group:
        for request, gap_s in zip(limit.apply(requests), arrivals.gaps(), strict=False):
            due_s += gap_s
            if limit.is_over(due_s - started_s):
                break
            await sleep(max(0.0, due_s - clock.monotonic()))
            if len(in_flight) >= MAX_IN_FLIGHT:
                finish(_refused(request, due_s, clock.monotonic()))
                continue
            task = group.create_task(one(request, due_s))
            in_flight.add(task)
            task.add_done_callback(in_flight.discard)
    return records


def _refused(request: WorkloadRequest, due_s: float, now_s: float) -> RequestRecord:
    record = RequestRecord(RequestTimeline(due_s), request.output_len, ended_s=now_s)
    record.error = f"not sent: {MAX_IN_FLIGHT} requests were already under way in the client"
    return record
