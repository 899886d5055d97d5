"""Closed and open loop on a clock the test owns, and one request timed against a fake server."""

from __future__ import annotations

import asyncio
import itertools
import statistics
from collections.abc import Iterator

import pytest

from tests.unit.loadgen.fake_server import (
    FakeRequest,
    FakeServer,
    Reply,
    text_chunk,
    usage_chunk,
)
from xdeepserve.loadgen import runner
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.runner import (
    Arrivals,
    Limit,
    RequestRecord,
    RequestSender,
    run_closed_loop,
    run_open_loop,
)
from xdeepserve.loadgen.workload import WorkloadRequest
from xdeepserve.telemetry import RequestTimeline
from xdeepserve.testing.fake_clock import FakeClock

REQUEST = WorkloadRequest("/v1/completions", {"prompt": [1, 2], "max_tokens": 3}, 2, 3)


class SleepClock(FakeClock):
    """Time moves only when somebody sleeps."""

    async def sleep(self, seconds: float) -> None:
        self.advance(seconds)
        await asyncio.sleep(0)


class TickClock(FakeClock):
    """Every look at the clock takes a second."""

    def monotonic(self) -> float:
        self.advance(1.0)
        return super().monotonic()


class FakeSend:
    """Answers each request after `service_s`, and remembers how many were under way."""

    def __init__(self, clock: SleepClock, service_s: float = 1.0) -> None:
        self.clock = clock
        self.service_s = service_s
        self.num_under_way = 0
        self.most_under_way = 0
        self.arrivals: list[float] = []

    async def __call__(self, request: WorkloadRequest, arrived_s: float) -> RequestRecord:
        self.arrivals.append(arrived_s)
        self.num_under_way += 1
        self.most_under_way = max(self.most_under_way, self.num_under_way)
        await self.clock.sleep(self.service_s)
        self.num_under_way -= 1
        return RequestRecord(RequestTimeline(arrived_s), 3, ended_s=self.clock.monotonic())


def endless() -> Iterator[WorkloadRequest]:
    return itertools.repeat(REQUEST)


def ignore(record: RequestRecord) -> None:
    pass


async def test_closed_loop_keeps_its_concurrency() -> None:
    clock = SleepClock()
    send = FakeSend(clock)
    records = await run_closed_loop(
        send, endless(), concurrency=4, limit=Limit(10), on_record=ignore, clock=clock
    )
    assert len(records) == 10
    assert send.most_under_way == 4


async def test_closed_loop_stops_at_the_duration() -> None:
    clock = SleepClock()
    records = await run_closed_loop(
        FakeSend(clock),
        endless(),
        concurrency=1,
        limit=Limit(duration_s=5.0),
        on_record=ignore,
        clock=clock,
    )
    assert len(records) == 5


async def test_open_loop_sends_at_the_drawn_times() -> None:
    clock = SleepClock(monotonic_s=100.0)
    send = FakeSend(clock, service_s=0.0)
    arrivals = Arrivals(rate=2.0, seed=7)
    await run_open_loop(
        send,
        endless(),
        arrivals=arrivals,
        limit=Limit(5),
        on_record=ignore,
        clock=clock,
        sleep=clock.sleep,
    )
    expected = list(itertools.accumulate(itertools.islice(arrivals.gaps(), 5), initial=100.0))[1:]
    assert send.arrivals == expected


async def test_open_loop_does_not_wait_for_answers() -> None:
    clock = SleepClock()
    release = asyncio.Event()
    started: list[float] = []

    async def stuck(request: WorkloadRequest, arrived_s: float) -> RequestRecord:
        started.append(arrived_s)
        if len(started) == 6:
            release.set()
        await release.wait()
        return RequestRecord(RequestTimeline(arrived_s), 3)

    async with asyncio.timeout(10):
        records = await run_open_loop(
            stuck,
            endless(),
            arrivals=Arrivals(1.0),
            limit=Limit(6),
            on_record=ignore,
            clock=clock,
            sleep=clock.sleep,
        )
    assert len(records) == 6


async def test_open_loop_records_what_it_could_not_send(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_IN_FLIGHT", 2)
    clock = SleepClock()
    release = asyncio.Event()
    seen: list[RequestRecord] = []

    async def stuck(request: WorkloadRequest, arrived_s: float) -> RequestRecord:
        await release.wait()
        return RequestRecord(RequestTimeline(arrived_s), 3)

    def on_record(record: RequestRecord) -> None:
        seen.append(record)
        if len(seen) == 3:
            release.set()

    async with asyncio.timeout(10):
        records = await run_open_loop(
            stuck,
            endless(),
            arrivals=Arrivals(1.0),
            limit=Limit(5),
            on_record=on_record,
            clock=clock,
            sleep=clock.sleep,
        )
    assert [record.error is None for record in records] == [False, False, False, True, True]
    assert records == seen


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    gaps = list(itertools.islice(Arrivals(20.0, burstiness, seed=1).gaps(), 20_000))
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.05)
    assert statistics.stdev(gaps) / mean == pytest.approx(burstiness**-0.5, rel=0.05)


async def test_request_is_timed_and_counted_by_usage() -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.start_stream()
        await reply.event(text_chunk("a"))
        await reply.event(text_chunk("bc", "length"))  # one chunk, two tokens
        await reply.event(usage_chunk(2, 3))
        await reply.end_stream()

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        record = await RequestSender(client, TickClock()).send(REQUEST, 1000.0)
    assert record.error is None
    assert record.timeline.num_output_tokens == 3
    assert len(record.gaps_s) == 1
    assert record.timeline.arrived_s < (record.timeline.first_token_s or 0)
    assert (record.timeline.last_token_s or 0) < record.ended_s


async def test_chunks_are_counted_without_usage() -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.start_stream()
        for text in "abc":
            await reply.event(text_chunk(text))
        await reply.end_stream()

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        record = await RequestSender(client).send(REQUEST, 0.0)
    assert (record.usage, record.timeline.num_output_tokens) == (None, 3)


async def refuse(request: FakeRequest, reply: Reply) -> None:
    await reply.send_json({"error": {"message": "full"}}, status=503)


async def cut_off(request: FakeRequest, reply: Reply) -> None:
    await reply.start_stream()
    await reply.event(text_chunk("a"))
    reply.cut()


async def fail_inside(request: FakeRequest, reply: Reply) -> None:
    await reply.start_stream()
    await reply.event({"error": {"message": "engine died"}})
    await reply.end_stream()


async def say_nothing(request: FakeRequest, reply: Reply) -> None:
    await reply.start_stream()
    await reply.end_stream()


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (refuse, "HTTP 503: full"),
        (cut_off, "middle of an answer"),
        (fail_inside, "engine died"),
        (say_nothing, "no output"),
    ],
)
async def test_failure_is_in_the_record(handler: object, message: str) -> None:
    async with FakeServer(handler) as server, HttpClient(server.url) as client:  # type: ignore[arg-type]
        record = await RequestSender(client).send(REQUEST, 0.0)
    assert record.error is not None
    assert message in record.error
    assert record.ended_s > 0
