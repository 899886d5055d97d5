"""Random histories of groups and requests: nothing is lost, doubled or counted twice."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.flowserve.builders import make_request
from tests.unit.flowserve.fake_engine import INFO, FakeEngine
from xdeepserve.errors import CapacityError
from xdeepserve.flowserve.replay import ReplayPolicy
from xdeepserve.flowserve.router import RouterEngine
from xdeepserve.messages import FinishReason, TokenOutput
from xdeepserve.testing.fake_clock import FakeClock
from xdeepserve.testing.scripted_executor import scripted_output

NAMES = ("a", "b", "c")
MAX_TOKENS = 6
POLICY = ReplayPolicy(max_replays=10**6, max_stalled_replays=10**6, retry_s=0.0)
names = st.sampled_from(NAMES)
picks = st.integers(0, 10**6)


class RouterMachine(RuleBasedStateMachine):
    """Three groups that die, come back, fill up, leave and join, under streams that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.router = RouterEngine(INFO, policy=POLICY, clock=FakeClock())
        self.engines: dict[str, FakeEngine] = {}
        self.num_requests = 0
        self.reading: dict[str, asyncio.Task[None]] = {}
        self.got: dict[str, list[TokenOutput]] = {}
        self.asked: set[str] = set()
        for name in NAMES:
            self.join(name)

    def teardown(self) -> None:
        for task in self.reading.values():
            task.cancel()
        self.settle()
        self.runner.close()

    def settle(self, turns: int = 20) -> None:
        async def turn() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)

        self.runner.run(turn())

    async def _read(self, request_id: str, prompt: list[int]) -> None:
        request = make_request(request_id, prompt, max_tokens=MAX_TOKENS)
        async for output in self.router.generate(request=request):
            self.got[request_id].append(output)

    def homes(self) -> list[tuple[str, str]]:
        return [(name, i) for name, engine in self.engines.items() for i in engine.running]

    @rule(prompt=st.lists(st.integers(3, 9), min_size=1, max_size=12))
    def submit(self, prompt: list[int]) -> None:
        request_id = f"{self.num_requests}:{'.'.join(map(str, prompt))}"
        self.num_requests += 1
        self.got[request_id] = []
        loop = self.runner.get_loop()
        self.reading[request_id] = loop.create_task(self._read(request_id, prompt))
        self.settle()

    @initialize()
    def start_busy(self) -> None:
        for length in range(1, 7):
            self.submit([3 + length] * length)

    @rule(chosen=st.lists(picks, min_size=1, max_size=8))
    def emit(self, chosen: list[int]) -> None:
        for pick in chosen:
            if homes := self.homes():
                name, attempt = homes[pick % len(homes)]
                self.engines[name].emit(attempt)
        self.settle()

    @rule(pick=picks, comes_back=st.booleans())
    def die(self, pick: int, comes_back: bool) -> None:
        """Kill a group that has requests."""
        if homes := self.homes():
            engine = self.engines[homes[pick % len(homes)][0]]
            engine.die()
            if comes_back:
                engine.revive()
            self.settle()

    @rule(name=names)
    def revive(self, name: str) -> None:
        if name in self.engines:
            self.engines[name].revive()
            self.settle()

    @rule(name=names, is_full=st.booleans(), is_late=st.booleans())
    def fill(self, name: str, is_full: bool, is_late: bool) -> None:
        if name in self.engines:
            self.engines[name].is_full = is_full
            self.engines[name].refuses_late = is_late

    @rule(name=names)
    def leave(self, name: str) -> None:
        if name in self.engines and len(self.engines) > 1:
            self.runner.run(self.router.remove(name, drain_timeout_s=0.0))
            del self.engines[name]

    @rule(name=names)
    def join(self, name: str) -> None:
        if name not in self.engines:
            self.engines[name] = FakeEngine()
            self.router.add(name, self.engines[name])

    @rule(pick=picks)
    def abort(self, pick: int) -> None:
        if self.reading:
            request_id = list(self.reading)[pick % len(self.reading)]
            self.asked.add(request_id)
            self.runner.run(self.router.abort(request_id=request_id))
            self.settle()

    @invariant()
    def every_open_request_is_at_one_group_or_waits_for_one(self) -> None:
        open_ids = {i for i, task in self.reading.items() if not task.done()}
        placed = [attempt.split("~")[0] for _, attempt in self.homes()]
        assert len(placed) == len(set(placed)), "a request runs twice"
        assert set(placed) <= open_ids
        members = self.router.members()
        num_running = {name: len(engine.running) for name, engine in self.engines.items()}
        assert {s.name: s.num_requests for s in members} == num_running
        assert self.router.load().num_waiting == len(open_ids) - len(placed)

    @invariant()
    def every_client_has_a_prefix_of_its_answer(self) -> None:
        for request_id, outputs in self.got.items():
            prompt = [int(i) for i in request_id.split(":")[1].split(".")]
            ids = [i for output in outputs for i in output.token_ids]
            assert ids == scripted_output(prompt, len(ids))
            for output in outputs[:-1]:
                assert output.finish_reason is None
            if outputs:
                assert outputs[-1].usage.num_output_tokens == len(ids)
            self.check_end(request_id, outputs, ids)

    def check_end(self, request_id: str, outputs: list[TokenOutput], ids: list[Any]) -> None:
        task = self.reading[request_id]
        if not task.done():
            return
        if (error := task.exception()) is not None:
            assert isinstance(error, CapacityError)
            assert not outputs, "an accepted request was refused"
        elif outputs[-1].finish_reason is FinishReason.ABORT:
            assert request_id in self.asked
        else:
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            assert len(ids) == MAX_TOKENS


RouterMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRouterMachine = pytest.mark.timeout(120)(RouterMachine.TestCase)
