"""Law 1 under speculation: drafts decide when tokens come, never which.

Tokens, logprobs and ends are compared to those of plain decoding, request by request alone. The
guided proposer knows the answers and errs now and then, so that drafts of every model are accepted
in full, in part and not at all; the n-gram proposer is the one that users get.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from typing import Any

import msgspec
import pytest

from tests import law1_harness as law1
from tests.module_threads import ModuleThreads
from tests.toys import toy_model
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.executor import InProcExecutor
from xdeepserve.flowserve.scheduler import Scheduler
from xdeepserve.flowserve.speculator import Proposer, Speculator
from xdeepserve.messages import FinishReason, GenerateRequest
from xdeepserve.models.decoder import Model
from xdeepserve.rtc import KVCacheManager
from xdeepserve.testing.fake_clock import FakeClock
from xdeepserve.testing.toy_models import TOY_MODELS
from xdeepserve.transformerless.moe_transport import MoeTransport
from xdeepserve.transformerless.stage_times import StageTimes

MAX_TOKENS = 24
CASES = (
    *((toy, "bf16", "cpu") for toy in TOY_MODELS),
    ("glm4_moe", "int8", "cpu"),
    ("deepseek_v3", "int8", "cpu"),
    ("deepseek_v3", "float32", "cpu"),
    ("qwen3_moe", "float32", "reference"),
)
NUM_REQUESTS = {"cpu": 8, "reference": 3}
WRONG_EVERY = 5


class StepClock(FakeClock):
    """Every look at it is a second later: steps take equally long, so drafts are free."""

    def monotonic(self) -> float:
        self.advance(1.0)
        return super().monotonic()


class GuidedProposer:
    """Knows what each request will get; every WRONG_EVERY-th draft is wrong."""

    def __init__(self, sequences: Sequence[list[int]]) -> None:
        self._sequences = sequences
        self._num_drafts = 0

    def propose(self, token_ids: array[int], *, limit: int) -> tuple[int, ...]:
        known = token_ids.tolist()
        for sequence in self._sequences:
            if sequence[: len(known)] == known:
                return tuple(map(self._err, sequence[len(known) : len(known) + limit]))
        return ()

    def _err(self, token_id: int) -> int:
        self._num_drafts += 1
        return token_id ^ 1 if self._num_drafts % WRONG_EVERY == 0 else token_id


def requests_for(vocab_size: int, count: int) -> list[GenerateRequest]:
    """Every way of sampling; then heavy penalties and stop ids, which depend on all output."""
    requests = law1.mixed_requests(vocab_size, count, max_tokens=MAX_TOKENS)
    heavy = {"presence_penalty": 1.5, "frequency_penalty": 0.8, "repetition_penalty": 1.4}
    params = {"max_tokens": MAX_TOKENS, "min_tokens": 6, "stop_token_ids": tuple(range(3, 40))}
    prompt = list(requests[0].prompt_token_ids)
    return [
        *requests,
        law1.request("penalized", [*prompt, 7], max_tokens=MAX_TOKENS, **heavy),
        law1.request("stopped", [*prompt, 8], temperature=0.9, **params),
    ]


def drafting_group(model: Model, config: EngineConfig, proposer: Proposer) -> DPGroup:
    """As `build_dp_group`, with another source of drafts."""
    plain = build_dp_group(model=model, model_name="toy", config=config, clock=FakeClock())
    times = StageTimes()
    executor = InProcExecutor(
        model=model,
        transport=None,
        num_blocks=config.num_kv_blocks,
        block_size=config.block_size,
        stage_times=times,
        num_microbatches=config.num_microbatches or 1,
    )
    scheduler = Scheduler(
        config=config,
        kv=KVCacheManager(
            num_blocks=config.num_kv_blocks,
            block_size=config.block_size,
            prefix_caching=config.prefix_caching,
        ),
        max_model_len=plain.info.max_model_len,
        eos_token_ids=plain.info.eos_token_ids,
        speculator=Speculator(proposer, num_speculative_tokens=config.num_speculative_tokens),
    )
    return DPGroup(
        info=plain.info,
        scheduler=scheduler,
        executor=executor,
        clock=StepClock(),
        max_num_waiting=config.max_num_waiting,
    )


class Case:
    """A model, requests, what plain decoding gives them, and groups that draft."""

    def __init__(self, model: Model, count: int) -> None:
        self.model = model
        self.requests = requests_for(model.spec.vocab_size, count)
        self.expected: dict[str, Any] = law1.solo(self._plain_group, self.requests)
        self._groups: list[DPGroup] = []

    def _plain_group(self, config: EngineConfig) -> DPGroup:
        return build_dp_group(model=self.model, model_name="toy", config=config, clock=FakeClock())

    def make_group(self, config: EngineConfig) -> DPGroup:
        sequences = [[*r.prompt_token_ids, *self.expected[r.request_id][0]] for r in self.requests]
        group = drafting_group(self.model, config, GuidedProposer(sequences))
        self._groups.append(group)
        return group

    def check_that_drafts_were_accepted_and_refused(self) -> None:
        """Of the groups since the last call, or nothing was checked."""
        loads = [group.load() for group in self._groups]
        self._groups.clear()
        num_accepted = sum(load.num_accepted_tokens for load in loads)
        assert 0 < num_accepted < sum(load.num_draft_tokens for load in loads)


@cache
def make_case(toy: str, dtype: str, backend: str) -> Case:
    return Case(toy_model(toy, dtype, backend), NUM_REQUESTS[backend])


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    toy, dtype, backend = request.param
    return make_case(toy, dtype, backend)


def test_alone(case: Case) -> None:
    assert law1.solo(case.make_group, case.requests) == case.expected
    case.check_that_drafts_were_accepted_and_refused()


def test_batched(case: Case) -> None:
    law1.check_alone_equals_batched(case.make_group, case.requests, case.expected)
    case.check_that_drafts_were_accepted_and_refused()


def test_any_number_of_drafts_and_small_budgets(case: Case) -> None:
    for number, size in ((1, 16), (2, 11), (7, 64)):
        limits = law1.config(
            num_speculative_tokens=number, max_num_seqs=8, max_num_batched_tokens=size
        )
        group = case.make_group(limits)
        assert law1.contents(law1.generate(group, case.requests)) == case.expected
    case.check_that_drafts_were_accepted_and_refused()


def test_prefix_hits_on_blocks_that_drafts_filled(case: Case) -> None:
    law1.check_prefix_hit_equals_recompute(case.make_group, case.requests, case.expected)
    case.check_that_drafts_were_accepted_and_refused()


def test_microbatches(case: Case) -> None:
    law1.check_microbatches(case.make_group, case.requests, case.expected)
    case.check_that_drafts_were_accepted_and_refused()


@pytest.mark.parametrize("toy", ["glm4_moe", "deepseek_v3"])
def test_a_pool_that_is_short(toy: str) -> None:
    case = make_case(toy, "bf16", "cpu")
    short = [r for r in case.requests if len(r.prompt_token_ids) < 40]
    group = case.make_group(law1.config(num_kv_blocks=8, max_model_len=64))
    results = law1.contents(law1.generate(group, short))
    assert results == {r.request_id: case.expected[r.request_id] for r in short}
    assert group.load().num_preemptions > 0
    case.check_that_drafts_were_accepted_and_refused()


@pytest.mark.parametrize("toy", ["glm4_moe", "deepseek_v3"])
def test_resumed_after_any_token(toy: str) -> None:
    case = make_case(toy, "bf16", "cpu")
    for count in (1, 3, 10):
        asked = {
            r.request_id: msgspec.structs.replace(
                r, resume_token_ids=case.expected[r.request_id][0][:count]
            )
            for r in case.requests
            if len(case.expected[r.request_id][0]) > count
        }
        results = law1.generate(case.make_group(law1.config()), list(asked.values()))
        for request_id, result in results.items():
            token_ids, logprobs, reason = case.expected[request_id]
            assert result.content == (token_ids[count:], logprobs[count:], reason)
    case.check_that_drafts_were_accepted_and_refused()


def test_aborted_among_others() -> None:
    case = make_case("deepseek_v3", "bf16", "cpu")
    group = case.make_group(law1.config())
    results = {r.request_id: law1.Generation([], []) for r in case.requests}
    for item in case.requests:
        group.submit(item)
    steps = 0
    while any(result.finish_reason is None for result in results.values()):
        for output in group.step():
            result = results[output.request_id]
            result.token_ids += output.token_ids
            result.logprobs += output.logprobs or []
            result.finish_reason = output.finish_reason
        steps += 1
        if steps in (6, 9):
            group.abort(case.requests[steps % 4].request_id)
    assert group.load().num_free_blocks == law1.config().num_kv_blocks
    for request_id, result in results.items():
        token_ids, logprobs, reason = case.expected[request_id]
        if result.finish_reason is FinishReason.ABORT:
            assert result.token_ids == token_ids[: len(result.token_ids)]
        else:
            assert result.content == (token_ids, logprobs, reason)


# -- as users get it -------------------------------------------------------------------------------


def quoting_requests(vocab_size: int) -> list[GenerateRequest]:
    """Prompts in which everything occurs twice, so that looking back finds something."""
    plain = law1.mixed_requests(vocab_size, 8, max_tokens=2 * MAX_TOKENS)
    return [
        msgspec.structs.replace(r, prompt_token_ids=r.prompt_token_ids * 2)
        for r in plain
        if len(r.prompt_token_ids) < 100
    ]


def ngram_group(model: Model, *, transport: MoeTransport | None = None, **limits: Any) -> DPGroup:
    return build_dp_group(
        model=model,
        model_name="toy",
        config=law1.config(**limits),
        clock=StepClock(),
        transport=transport,
    )


@pytest.mark.parametrize("toy", ["llama", "qwen3_moe", "deepseek_v3"])
def test_ngram_lookup(toy: str) -> None:
    model = toy_model(toy, "bf16", "cpu")
    requests = quoting_requests(model.spec.vocab_size)
    expected = law1.contents(law1.generate(ngram_group(model), requests))
    group = ngram_group(model, speculation="ngram")
    assert law1.contents(law1.generate(group, requests)) == expected
    assert group.load().num_draft_tokens > 0


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_over_workers(num_microbatches: int) -> None:
    model = toy_model("deepseek_v3", "bf16", "cpu")
    requests = quoting_requests(model.spec.vocab_size)
    expected = law1.contents(law1.generate(ngram_group(model), requests))
    with closing(ModuleThreads(model, num_ffn=1, placement=[range(16)])) as workers:
        transport = workers.transport()
        group = ngram_group(
            model, transport=transport, speculation="ngram", num_microbatches=num_microbatches
        )
        results = law1.contents(law1.generate(group, requests))
        transport.close()
    assert results == expected
    assert group.load().num_draft_tokens > 0
