"""RouterEngine over fakes: where requests go, and what becomes of those that lose their group."""

# size: one scenario per test, all over the same fakes

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from tests.unit.flowserve.builders import make_request
from tests.unit.flowserve.fake_engine import INFO, FakeEngine
from xdeepserve.errors import CapacityError, ConfigError, EngineDeadError, RequestError
from xdeepserve.flowserve.prefix_memory import prefix_digests
from xdeepserve.flowserve.replay import ReplayPolicy
from xdeepserve.flowserve.router import RouterEngine
from xdeepserve.messages import EngineInfo, FinishReason, GenerateRequest, TokenOutput
from xdeepserve.testing.fake_clock import FakeClock
from xdeepserve.testing.scripted_executor import scripted_output

TIMEOUT_S = 30.0
POLICY = ReplayPolicy(max_replays=6, max_stalled_replays=2, deadline_s=10.0, retry_s=0.0)


class Routed:
    """A router over two fakes."""

    def __init__(self, *names: str, policy: ReplayPolicy = POLICY, info: EngineInfo = INFO) -> None:
        self.clock = FakeClock()
        self.router = RouterEngine(info, policy=policy, clock=self.clock)
        self.engines = {name: FakeEngine(info) for name in names or ("a", "b")}
        for name, engine in self.engines.items():
            self.router.add(name, engine)

    def __getitem__(self, name: str) -> FakeEngine:
        return self.engines[name]

    def homes(self) -> list[tuple[str, str]]:
        """(engine, id it knows a request by), for all that run."""
        return [(name, i) for name, engine in self.engines.items() for i in engine.running]


@pytest.fixture
async def routed() -> Routed:
    return Routed()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0)


async def collect(stream: AsyncIterator[TokenOutput]) -> list[TokenOutput]:
    async with asyncio.timeout(TIMEOUT_S):
        return [output async for output in stream]


def ids_of(outputs: list[TokenOutput]) -> list[int]:
    return [i for output in outputs for i in output.token_ids]


# -- choice ---------------------------------------------------------------------------------------


async def test_the_group_with_the_least_kv_demand_is_chosen(routed: Routed) -> None:
    routed["a"].num_held_blocks = 5
    stream = routed.router.generate(request=make_request("r"))
    assert routed.homes() == [("b", "r")]
    await stream.aclose()


async def test_each_choice_counts_for_the_next(routed: Routed) -> None:
    streams = [routed.router.generate(request=make_request(f"r{i}", [i] * 9)) for i in range(6)]
    assert [len(engine.running) for engine in routed.engines.values()] == [3, 3]
    assert routed.homes()[0] == ("a", "r0"), "a tie goes to the first name"
    assert len(streams) == 6


async def test_a_known_prefix_outweighs_a_fuller_pool_and_is_salted(routed: Routed) -> None:
    prompt = list(range(3, 43))
    first = routed.router.generate(request=make_request("r0", prompt))
    await first.aclose()
    routed["a"].num_held_blocks = 5
    streams = [
        routed.router.generate(request=make_request("same", [*prompt, 9])),
        routed.router.generate(request=make_request("salted", [*prompt, 9], cache_salt="t")),
    ]
    assert routed.homes() == [("a", "same"), ("b", "salted")]
    routed["a"].num_held_blocks = 30
    streams.append(routed.router.generate(request=make_request("spread", [*prompt, 8])))
    assert ("b", "spread") in routed.homes(), "no prefix is worth any imbalance"
    assert len(streams) == 3


async def test_dead_full_and_drained_groups_are_passed_over(routed: Routed) -> None:
    routed["a"].is_full = True
    first = routed.router.generate(request=make_request("r0"))
    assert routed.homes() == [("b", "r0")]
    routed["b"].is_full = True
    with pytest.raises(CapacityError, match="all DP groups"):
        routed.router.generate(request=make_request("r1"))
    await first.aclose()
    routed["a"].is_full = routed["b"].is_full = False
    routed["a"].is_up = False
    second = routed.router.generate(request=make_request("r2"))
    assert routed.homes() == [("b", "r2")]
    await second.aclose()
    routed["a"].is_up = True
    await routed.router.drain("b", timeout_s=0.0)
    third = routed.router.generate(request=make_request("r3"))
    assert routed.homes() == [("a", "r3")]
    await third.aclose()


async def test_a_group_that_refuses_late_is_passed_over(routed: Routed) -> None:
    routed["a"].refuses_late = True
    stream = routed.router.generate(request=make_request("r", max_tokens=1))
    reading = asyncio.create_task(collect(stream))
    await until(lambda: bool(routed["b"].running))
    ((name, attempt),) = routed.homes()
    routed[name].emit(attempt)
    assert ids_of(await reading) == scripted_output([5, 6, 7], 1)
    routed["b"].refuses_late = True
    with pytest.raises(CapacityError, match="all DP groups"):
        await collect(routed.router.generate(request=make_request("s")))
    assert routed.router.load().num_waiting == 0


async def test_ids_and_members_are_unique(routed: Routed) -> None:
    stream = routed.router.generate(request=make_request("r"))
    with pytest.raises(RequestError, match="in use"):
        routed.router.generate(request=make_request("r"))
    with pytest.raises(ConfigError, match="there already"):
        routed.router.add("a", FakeEngine())
    with pytest.raises(ConfigError, match="serves"):
        routed.router.add("c", FakeEngine(msgspec.structs.replace(INFO, model="other")))
    with pytest.raises(ConfigError, match="there are: a, b"):
        await routed.router.drain("c", timeout_s=0.0)
    await stream.aclose()
    await routed.router.generate(request=make_request("r")).aclose()


# -- replay ---------------------------------------------------------------------------------------


async def test_a_lost_request_goes_on_elsewhere_without_a_seam(routed: Routed) -> None:
    routed["a"].num_cached_tokens = 3
    request = make_request("r", max_tokens=5, min_tokens=4, logprobs=0, presence_penalty=0.5)
    reading = asyncio.create_task(collect(routed.router.generate(request=request)))
    for _ in range(2):
        routed["a"].emit("r")
    routed["a"].die()
    await until(lambda: bool(routed["b"].running))
    ((attempt, resumed),) = routed["b"].running.items()
    assert resumed.resume_token_ids == scripted_output([5, 6, 7], 2)
    assert resumed == msgspec.structs.replace(
        request, request_id=attempt, resume_token_ids=resumed.resume_token_ids
    )
    for _ in range(3):
        routed["b"].emit(attempt)
    outputs = await reading
    assert ids_of(outputs) == scripted_output([5, 6, 7], 5)
    assert [o.logprobs[0].logprob for o in outputs if o.logprobs] == [-1, -2, -3, -4, -5]
    assert {o.request_id for o in outputs} == {"r"}
    assert [o.usage.num_output_tokens for o in outputs] == [1, 2, 3, 4, 5]
    assert {(o.usage.num_prompt_tokens, o.usage.num_cached_tokens) for o in outputs} == {(3, 3)}
    assert [o.finish_reason for o in outputs] == [None] * 4 + [FinishReason.LENGTH]


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
async def test_an_end_that_nobody_asked_for_is_replayed(
    routed: Routed, reason: FinishReason
) -> None:
    reading = asyncio.create_task(
        collect(routed.router.generate(request=make_request("r", max_tokens=2)))
    )
    routed["a"].emit("r")
    routed["a"].end("r", reason)
    routed["a"].is_up = False
    await until(lambda: bool(routed["b"].running))
    routed["b"].emit(next(iter(routed["b"].running)))
    assert ids_of(await reading) == scripted_output([5, 6, 7], 2)


async def test_an_aborted_request_is_not_replayed(routed: Routed) -> None:
    reading = asyncio.create_task(collect(routed.router.generate(request=make_request("r"))))
    routed["a"].emit("r")
    routed["a"].keeps_aborted = True
    await routed.router.abort(request_id="r")
    routed["a"].die()
    outputs = await reading
    assert outputs[-1].finish_reason is FinishReason.ABORT
    assert outputs[-1].usage.num_output_tokens == 1
    assert routed.homes() == []


async def test_abort_reaches_the_attempt_that_runs(routed: Routed) -> None:
    reading = asyncio.create_task(collect(routed.router.generate(request=make_request("r"))))
    routed["a"].die()
    await until(lambda: bool(routed["b"].running))
    attempt = next(iter(routed["b"].running))
    await routed.router.abort(request_id="r")
    assert routed["b"].aborted == [attempt]
    assert [o.finish_reason for o in await reading] == [FinishReason.ABORT]


async def test_closing_and_forgetting_abort_at_the_group(routed: Routed) -> None:
    closed = routed.router.generate(request=make_request("r0"))
    await closed.aclose()
    await closed.aclose()
    assert set(routed["a"].aborted) == {"r0"}
    assert await collect(closed) == []
    forgotten = routed.router.generate(request=make_request("r1"))
    del forgotten
    gc.collect()
    assert "r1" in routed["a"].aborted
    assert [status.num_requests for status in routed.router.members()] == [0, 0]


async def test_a_cancelled_reader_aborts_at_the_group(routed: Routed) -> None:
    reading = asyncio.create_task(collect(routed.router.generate(request=make_request("r"))))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert routed["a"].aborted
    assert routed.homes() == []


async def test_a_request_that_kills_its_groups_ends_with_an_error(routed: Routed) -> None:
    reading = asyncio.create_task(collect(routed.router.generate(request=make_request("r"))))
    for _ in range(POLICY.max_stalled_replays + 1):
        await until(lambda: bool(routed.homes()))
        ((name, _attempt),) = routed.homes()
        routed[name].die()
        routed[name].revive()
    outputs = await reading
    assert [o.finish_reason for o in outputs] == [FinishReason.ERROR]
    assert "3 DP groups ended before its next token" in (outputs[0].error or "")
    assert routed.homes() == []


@pytest.mark.parametrize("names", ["a", "ab"])
async def test_neighbours_outlive_a_request_that_kills_its_groups(names: str) -> None:
    """A step computes all requests of a group, or ends it because of one of them."""
    routed = Routed(*names)
    prompts = {f"r{i}": [3 + i] * 4 for i in range(8)}
    poison = "r3"
    reading = {
        request_id: asyncio.create_task(
            collect(routed.router.generate(request=make_request(request_id, prompt, max_tokens=4)))
        )
        for request_id, prompt in prompts.items()
    }
    async with asyncio.timeout(TIMEOUT_S):
        while not all(task.done() for task in reading.values()):
            for engine in routed.engines.values():
                if any(attempt.split("~")[0] == poison for attempt in engine.running):
                    engine.die()
                    engine.revive()
                for attempt in list(engine.running):
                    engine.emit(attempt)
            for _ in range(20):
                await asyncio.sleep(0)
    assert [o.finish_reason for o in await reading.pop(poison)] == [FinishReason.ERROR]
    for request_id, task in reading.items():
        assert ids_of(await task) == scripted_output(prompts[request_id], 4)


async def lose_all(routed: Routed, name: str, num_requests: int) -> None:
    """Kill a group and revive it, once it has the requests; returns when all of them know."""

    def num_failures() -> int:
        return sum(s.num_failures for s in routed.router.members() if s.name == name)

    await until(lambda: len(routed[name].running) == num_requests)
    expected = num_failures() + num_requests
    routed[name].die()
    routed[name].revive()
    await until(lambda: num_failures() == expected)


async def test_of_those_who_ran_one_is_tried_at_a_time_and_the_others_wait() -> None:
    routed = Routed("a", info=msgspec.structs.replace(INFO, max_num_seqs=2))
    names = ["first", "second", "behind", "last"]
    reading = [
        asyncio.create_task(
            collect(routed.router.generate(request=make_request(name, max_tokens=2)))
        )
        for name in names
    ]
    for _ in range(2):
        await lose_all(routed, "a", len(names))
    await until(lambda: len(routed["a"].running) == 3)
    attempts = {attempt.split("~")[0]: attempt for attempt in routed["a"].running}
    assert set(attempts) == {"first", "behind", "last"}, "of two suspects one waits"
    routed.clock.advance(2 * POLICY.deadline_s)
    for is_up in (True, False, True):  # Its wait for a turn is no wait for a group.
        routed["a"].is_up = is_up
        for _ in range(20):
            await asyncio.sleep(0)
    assert len(routed["a"].running) == 3
    routed["a"].emit(attempts["first"])
    await until(lambda: len(routed["a"].running) == 4)
    for attempt in [*routed["a"].running] * 2:
        if attempt in routed["a"].running:
            routed["a"].emit(attempt)
    assert [ids_of(outputs) for outputs in await asyncio.gather(*reading)] == (
        [scripted_output([5, 6, 7], 2)] * 4
    )


async def test_progress_buys_replays_up_to_a_total(routed: Routed) -> None:
    reading = asyncio.create_task(
        collect(routed.router.generate(request=make_request("r", max_tokens=30)))
    )
    for _ in range(POLICY.max_replays + 1):
        await until(lambda: bool(routed.homes()))
        ((name, attempt),) = routed.homes()
        routed[name].emit(attempt)
        routed[name].die()
        routed[name].revive()
    outputs = await reading
    assert "7 DP groups ended under this request" in (outputs[-1].error or "")
    assert ids_of(outputs) == scripted_output([5, 6, 7], POLICY.max_replays + 1)


# -- waiting for a group --------------------------------------------------------------------------


async def test_without_a_group_requests_wait_for_one_until_the_deadline() -> None:
    routed = Routed("a")
    routed["a"].is_up = False
    assert routed.router.is_alive(), "a restart is a pause"
    reading = asyncio.create_task(
        collect(routed.router.generate(request=make_request("r", max_tokens=1)))
    )
    await asyncio.sleep(0)
    assert routed.router.load().num_waiting == 1
    routed["a"].revive()
    await until(lambda: bool(routed.homes()))
    routed["a"].emit(routed.homes()[0][1])
    assert len(await reading) == 1
    routed["a"].is_up = False
    assert routed.router.is_alive()
    late = asyncio.create_task(collect(routed.router.generate(request=make_request("s"))))
    await asyncio.sleep(0)
    routed.clock.advance(POLICY.deadline_s)
    assert not routed.router.is_alive()
    with pytest.raises(EngineDeadError, match="no DP group"):
        await late
    assert routed.router.load().num_waiting == 0


async def test_an_abort_is_heard_while_waiting_for_a_group() -> None:
    routed = Routed("a")
    reading = asyncio.create_task(collect(routed.router.generate(request=make_request("r"))))
    routed["a"].die()
    await until(lambda: routed.router.load().num_waiting == 1)
    await routed.router.abort(request_id="r")
    assert [o.finish_reason for o in await reading] == [FinishReason.ABORT]


async def test_an_accepted_request_waits_where_a_new_one_is_refused(routed: Routed) -> None:
    reading = asyncio.create_task(
        collect(routed.router.generate(request=make_request("r", max_tokens=2)))
    )
    routed["a"].emit("r")
    routed["b"].is_full = True
    routed["a"].die()
    await until(lambda: routed.router.load().num_waiting == 1)
    with pytest.raises(CapacityError):
        routed.router.generate(request=make_request("s"))
    routed["b"].is_full = False
    await until(lambda: bool(routed["b"].running))
    routed["b"].emit(routed.homes()[0][1])
    assert ids_of(await reading) == scripted_output([5, 6, 7], 2)


async def test_a_group_that_refuses_late_is_asked_less_and_less_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    routed = Routed(policy=replace(POLICY, retry_s=0.25, max_retry_s=1.0))
    pauses: list[float] = []
    hashed: list[int] = []

    async def sleep(seconds: float, real: Any = asyncio.sleep) -> None:
        pauses.append(seconds)
        await real(0)

    def count_hashes(request: GenerateRequest, block_size: int) -> list[bytes]:
        hashed.append(len(request.resume_token_ids))
        return prefix_digests(request, block_size)

    monkeypatch.setattr("xdeepserve.flowserve.router.prefix_digests", count_hashes)
    reading = asyncio.create_task(collect(routed.router.generate(request=make_request("r"))))
    routed["a"].emit("r")
    routed["b"].refuses_late = True
    routed["a"].die()
    monkeypatch.setattr(asyncio, "sleep", sleep)
    await until(lambda: routed["b"].num_refused == 5)
    assert [pause for pause in pauses if pause][:4] == [0.25, 0.5, 1.0, 1.0]
    assert hashed == [0, 1], "once per loss, not per attempt"
    routed.clock.advance(POLICY.deadline_s)
    with pytest.raises(CapacityError, match="all DP groups"):
        await reading
    assert routed.router.load().num_waiting == 0


async def test_requests_without_a_group_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdeepserve.flowserve.router.MAX_HOMELESS", 1)
    routed = Routed("a")
    routed["a"].is_up = False
    first = routed.router.generate(request=make_request("r0"))
    with pytest.raises(EngineDeadError):
        routed.router.generate(request=make_request("r1"))
    await first.aclose()


# -- coming and going -----------------------------------------------------------------------------


async def test_drain_waits_for_running_requests(routed: Routed) -> None:
    reading = asyncio.create_task(
        collect(routed.router.generate(request=make_request("r", max_tokens=1)))
    )
    draining = asyncio.create_task(routed.router.drain("a", timeout_s=TIMEOUT_S))
    await asyncio.sleep(0)
    assert not draining.done()
    routed["a"].emit("r")
    await reading
    await draining
    assert routed["a"].aborted == []


async def test_drain_moves_what_is_left_at_the_timeout(routed: Routed) -> None:
    reading = asyncio.create_task(
        collect(routed.router.generate(request=make_request("r", max_tokens=3)))
    )
    routed["a"].emit("r")
    await routed.router.remove("a", drain_timeout_s=0.0)
    assert routed["a"].aborted == ["r"]
    assert routed["a"].is_closed
    attempt = next(iter(routed["b"].running))
    routed["b"].emit(attempt)
    routed["b"].emit(attempt)
    assert ids_of(await reading) == scripted_output([5, 6, 7], 3)
    assert [s.name for s in routed.router.members()] == ["b"]
    assert routed.router.members()[0].num_failures == 0


async def test_close_aborts_what_the_drain_leaves(routed: Routed) -> None:
    reading = asyncio.create_task(collect(routed.router.generate(request=make_request("r"))))
    await asyncio.sleep(0)
    await routed.router.close(drain_timeout_s=0.0)
    assert [o.finish_reason for o in await reading] == [FinishReason.ABORT]
    assert all(engine.is_closed for engine in routed.engines.values())
    assert not routed.router.is_alive()
    with pytest.raises(CapacityError):
        routed.router.generate(request=make_request("s"))
