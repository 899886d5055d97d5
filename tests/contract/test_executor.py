"""Contract of Executor, over every implementation."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.toys import toy_model
from tests.unit.flowserve.builders import make_config, make_request, make_scheduler
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.executor import Executor, InProcExecutor
from xdeepserve.flowserve.scheduler import Scheduler
from xdeepserve.testing.scripted_executor import ScriptedExecutor
from xdeepserve.transformerless.stage_times import StageTimes

CONFIG = make_config(max_num_batched_tokens=8)


def scripted(config: EngineConfig) -> Executor:
    return ScriptedExecutor(num_blocks=config.num_kv_blocks, block_size=config.block_size)


def in_proc(config: EngineConfig, num_microbatches: int = 1) -> Executor:
    model = toy_model("glm4_moe")
    return InProcExecutor(
        model=model,
        transport=None,
        stage_times=StageTimes(),
        num_blocks=config.num_kv_blocks,
        block_size=config.block_size,
        num_microbatches=num_microbatches,
    )


def in_proc_two_microbatches(config: EngineConfig) -> Executor:
    return in_proc(config, num_microbatches=2)


@pytest.fixture(
    params=[scripted, in_proc, in_proc_two_microbatches], ids=lambda make: make.__name__
)
def executor(request: pytest.FixtureRequest) -> Executor:
    make: Callable[[EngineConfig], Executor] = request.param
    return make(CONFIG)


def make_loaded_scheduler() -> Scheduler:
    """A decode, a finished prefill with logprobs, and a prefill cut by the budget."""
    scheduler = make_scheduler(CONFIG)
    scheduler.add(make_request("a", [5, 6], temperature=0.0))
    scheduler.add(make_request("b", [7, 8, 9], temperature=0.0, logprobs=2))
    scheduler.add(make_request("c", range(10, 30), temperature=0.0))
    return scheduler


def test_results_align_with_the_plan(executor: Executor) -> None:
    executor.warm_up()
    plan = make_loaded_scheduler().schedule()
    before = [(i.token_ids.tolist(), i.block_ids.tolist()) for i in plan.scheduled]
    result = executor.execute(plan=plan)
    assert [item.samples for item in plan.scheduled] == [True, True, False]
    assert [len(ids) for ids in result.token_ids] == [1, 1, 0]
    assert [None if p is None else len(p) for p in result.logprobs] == [None, 1, None]
    assert [(i.token_ids.tolist(), i.block_ids.tolist()) for i in plan.scheduled] == before


def test_a_step_in_which_nobody_samples(executor: Executor) -> None:
    scheduler = make_scheduler(CONFIG)
    scheduler.add(make_request("c", range(10, 30)))
    plan = scheduler.schedule()
    result = executor.execute(plan=plan)
    assert (result.token_ids, result.logprobs) == (((),), (None,))


def test_results_fit_update_until_all_requests_end(executor: Executor) -> None:
    scheduler = make_loaded_scheduler()
    counts = dict.fromkeys("abc", 0)
    for _ in range(20):
        plan = scheduler.schedule()
        if plan.is_empty:
            break
        for output in scheduler.update(plan, executor.execute(plan=plan)):
            counts[output.request_id] += len(output.token_ids)
        scheduler.check_integrity()
    assert not scheduler.has_requests
    assert set(counts.values()) <= {1, 2, 3, 4}


def test_close_is_idempotent(executor: Executor) -> None:
    executor.close()
    executor.close()
