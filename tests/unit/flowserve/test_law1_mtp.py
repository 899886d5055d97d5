"""Drafts by the model's own MTP layer: they are what one pass over the sequence gives, and law 1.

A toy with the layer is, but for the layer, the toy without; so what plain decoding of the latter
gives is expected, bit for bit.
"""

from __future__ import annotations

from array import array
from contextlib import closing
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
import pytest

from tests import law1_harness as law1
from tests.module_threads import ModuleThreads
from tests.toys import toy_model
from tests.unit.flowserve.test_law1_speculation import StepClock, requests_for
from xdeepserve.config import EngineConfig
from xdeepserve.errors import ConfigError
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.executor import InProcExecutor
from xdeepserve.flowserve.input_batch import build_forward_batch
from xdeepserve.flowserve.scheduler import Scheduler
from xdeepserve.flowserve.speculator import Speculator
from xdeepserve.flowserve.step import ScheduledRequest
from xdeepserve.messages import GenerateRequest, SamplingParams
from xdeepserve.models.decoder import Model, layer_steps, local_ffn
from xdeepserve.ops import F32, KVLayer
from xdeepserve.rtc import KVCacheManager
from xdeepserve.testing.toy_models import MTP_TOYS
from xdeepserve.transformerless.moe_transport import MoeTransport
from xdeepserve.transformerless.stage_times import StageTimes

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 8, 64, 500
CASES = (
    *((toy, dtype) for toy in MTP_TOYS for dtype in ("bf16", "int8")),
    ("deepseek_v3_mtp", "float32"),
)


class Case:
    """A toy with the layer, requests, and what they get from the toy without it."""

    def __init__(self, toy: str, dtype: str) -> None:
        self.model = toy_model(toy, dtype, "cpu")
        plain = toy_model(toy.removesuffix("_mtp"), dtype, "cpu")
        self.requests = requests_for(plain.spec.vocab_size, 8)
        self.expected: dict[str, Any] = law1.solo(
            lambda config: build_dp_group(model=plain, model_name="toy", config=config),
            self.requests,
        )
        self._groups: list[DPGroup] = []

    def make_group(self, config: EngineConfig, *, transport: MoeTransport | None = None) -> DPGroup:
        group = build_dp_group(
            model=self.model,
            model_name="toy",
            config=replace(config, speculation="mtp"),
            clock=StepClock(),
            transport=transport,
        )
        self._groups.append(group)
        return group

    def check_that_drafts_were_checked(self) -> None:
        """By one group at least of those since the last call, or nothing was checked."""
        assert any(group.load().num_draft_tokens > 0 for group in self._groups)
        self._groups.clear()


@cache
def make_case(toy: str, dtype: str) -> Case:
    return Case(toy, dtype)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(*request.param)


def test_alone(case: Case) -> None:
    assert law1.solo(case.make_group, case.requests) == case.expected
    case.check_that_drafts_were_checked()


def test_batched(case: Case) -> None:
    law1.check_alone_equals_batched(case.make_group, case.requests, case.expected)
    case.check_that_drafts_were_checked()


def test_any_chunk_size_and_number_of_drafts(case: Case) -> None:
    for number, size in ((1, 11), (2, 16), (5, 64)):
        limits = law1.config(
            num_speculative_tokens=number, max_num_seqs=8, max_num_batched_tokens=size
        )
        results = law1.generate(case.make_group(limits), case.requests)
        assert law1.contents(results) == case.expected
    case.check_that_drafts_were_checked()


def test_prefix_hits(case: Case) -> None:
    law1.check_prefix_hit_equals_recompute(case.make_group, case.requests, case.expected)
    case.check_that_drafts_were_checked()


def test_microbatches(case: Case) -> None:
    law1.check_microbatches(case.make_group, case.requests, case.expected)
    case.check_that_drafts_were_checked()


def test_a_pool_that_is_short() -> None:
    case = make_case("deepseek_v3_mtp", "bf16")
    short = [r for r in case.requests if len(r.prompt_token_ids) < 40]
    group = case.make_group(law1.config(num_kv_blocks=8, max_model_len=64))
    results = law1.contents(law1.generate(group, short))
    assert results == {r.request_id: case.expected[r.request_id] for r in short}
    assert group.load().num_preemptions > 0
    case.check_that_drafts_were_checked()


def test_resumed() -> None:
    case = make_case("deepseek_v3_mtp", "bf16")
    asked = [
        msgspec.structs.replace(r, resume_token_ids=case.expected[r.request_id][0][:4])
        for r in case.requests
        if len(case.expected[r.request_id][0]) > 4
    ]
    for request_id, result in law1.generate(case.make_group(law1.config()), asked).items():
        token_ids, logprobs, reason = case.expected[request_id]
        assert result.content == (token_ids[4:], logprobs[4:], reason)
    case.check_that_drafts_were_checked()


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_over_workers(num_microbatches: int) -> None:
    case = make_case("deepseek_v3_mtp", "bf16")
    with closing(ModuleThreads(case.model, num_ffn=1, placement=[range(16)])) as workers:
        transport = workers.transport()
        group = case.make_group(law1.config(num_microbatches=num_microbatches), transport=transport)
        results = law1.contents(law1.generate(group, case.requests))
        transport.close()
    assert results == case.expected
    case.check_that_drafts_were_checked()


def test_a_model_without_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="speculation='mtp' needs a layer"):
        build_dp_group(
            model=toy_model("deepseek_v3", "bf16", "cpu"),
            model_name="toy",
            config=law1.config(speculation="mtp"),
        )


# -- the drafts themselves -------------------------------------------------------------------------


class OnePass:
    """Drafts of one sequence by one pass of main model and layer over all of it, greedily."""

    def __init__(self, model: Model) -> None:
        assert model.mtp is not None
        self._model, self._mtp = model, model.mtp

    def drafts(self, token_ids: list[int], count: int) -> list[int]:
        num_blocks = -(-(len(token_ids) + count) // BLOCK_SIZE)
        kv = self._model.kv_format.new_layer(num_blocks, BLOCK_SIZE)
        states = self._mtp.main_states(self._hidden_states(token_ids[:-1]))
        known, first, drafts = list(token_ids), 0, []
        for _ in range(count):
            states, draft = self._pass(known, first, states, kv)
            drafts.append(draft)
            known.append(draft)
            first = len(known) - 2
        return drafts

    def _pass(self, known: list[int], first: int, states: F32, kv: KVLayer) -> tuple[F32, int]:
        batch = build_forward_batch([_share(known[1:], first)], BLOCK_SIZE)
        states = self._mtp(states, batch, kv)
        return states[-1:], int(self._mtp.head(states, batch.logits_rows)[0].argmax())

    def _hidden_states(self, token_ids: list[int]) -> F32:
        model = self._model
        batch = build_forward_batch([_share(token_ids, 0)], BLOCK_SIZE)
        num_blocks = batch.attention.block_tables.size
        steps = layer_steps(model.attention_side, batch, model.new_kv(num_blocks, BLOCK_SIZE))
        call = next(steps)
        while True:
            try:
                call = steps.send(local_ffn(model, call))
            except StopIteration as finished:
                hidden_states: F32 = finished.value
                return hidden_states


def _share(token_ids: list[int], first: int) -> ScheduledRequest:
    """Rows from position `first` to the end, in blocks 0, 1, ..."""
    return ScheduledRequest(
        request_id="one",
        params=SamplingParams(max_tokens=1),
        token_ids=array("i", token_ids),
        num_prompt_tokens=1,
        num_computed_tokens=first,
        num_scheduled_tokens=len(token_ids) - first,
        block_ids=array("i", range(-(-len(token_ids) // BLOCK_SIZE))),
        samples=True,
    )


@pytest.mark.parametrize("toy", MTP_TOYS)
@pytest.mark.parametrize("budget", [7, 64])
def test_every_draft_is_that_of_one_pass(toy: str, budget: int) -> None:
    model = toy_model(toy, "bf16", "cpu")
    config = law1.config(
        num_kv_blocks=NUM_BLOCKS,
        max_num_seqs=4,
        max_num_batched_tokens=budget,
        num_speculative_tokens=3,
        prefix_caching=False,
    )
    executor = InProcExecutor(
        model=model,
        transport=None,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        stage_times=StageTimes(),
        with_mtp=True,
    )
    scheduler = Scheduler(
        config=config,
        kv=KVCacheManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, prefix_caching=False),
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(),
        speculator=Speculator(None, num_speculative_tokens=3),
    )
    for idx, length in enumerate((3, 19, 40)):
        prompt = [3 + (idx * 97 + j * 29 + j * j) % 300 for j in range(length)]
        scheduler.add(
            GenerateRequest(
                request_id=f"r{idx}",
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=20, temperature=0.0),
            )
        )
    one_pass, num_checked = OnePass(model), 0
    while scheduler.has_requests:
        plan = scheduler.schedule()
        result = executor.execute(plan=plan)
        rows = zip(plan.scheduled, result.token_ids, result.draft_token_ids, strict=True)
        for item, new, drafts in rows:
            assert bool(new) == bool(drafts)
            assert list(drafts) == one_pass.drafts([*item.token_ids, *new], len(drafts))
            num_checked += len(drafts)
        scheduler.update(plan, result)
        scheduler.record_duration(plan, replace(result, drafting_s=0.0), 1.0)  # drafts are free
    assert num_checked > 3 * 20
    assert scheduler.load_report().num_draft_tokens > 0
