"""Law 1 on toy models: a mixture of experts and latent attention, in every precision."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import cache
from typing import Any

import numpy as np
import pytest

from tests import law1_harness as law1
from tests.module_threads import ModuleThreads
from tests.toys import build_toy, toy_model
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.messages import GenerateRequest
from xdeepserve.models.decoder import Model
from xdeepserve.ops import F32, PackedWeight
from xdeepserve.ops.reference import ReferenceOps
from xdeepserve.testing.fake_clock import FakeClock

DTYPES = ("float32", "bf16", "int8", "int4", "w8a16", "w8a8g64")
INT8_CACHE = " and its cache"
"""After a dtype: the KV cache is int8 too."""

CASES = (
    *((toy, dtype, "cpu") for toy in ("glm4_moe", "deepseek_v3") for dtype in DTYPES),
    *(("glm4_moe", f"{dtype}{INT8_CACHE}", "cpu") for dtype in ("float32", "int8")),
    ("glm4_moe", "float32", "reference"),
    ("deepseek_v3", "int8", "reference"),
    ("glm4_moe", "int4", "reference"),
)
NUM_REQUESTS = {"cpu": 16, "reference": 4}
"""Per operator backend; the reference is slow."""


def factory(model: Model) -> law1.GroupFactory:
    def make_group(config: EngineConfig) -> DPGroup:
        return build_dp_group(model=model, model_name="toy", config=config, clock=FakeClock())

    return make_group


class Case:
    """A model, the requests, and what each request gets alone and unchunked."""

    def __init__(self, model: Model, count: int) -> None:
        self.model = model
        self.make_group = factory(model)
        self.requests: Sequence[GenerateRequest] = law1.mixed_requests(model.spec.vocab_size, count)
        self.expected: dict[str, Any] = law1.solo(self.make_group, self.requests)


@cache
def make_case(toy: str, dtype: str, backend: str) -> Case:
    model = toy_model(toy, dtype.removesuffix(INT8_CACHE), backend)
    if dtype.endswith(INT8_CACHE):
        model = model.with_kv_cache("int8")
    return Case(model, NUM_REQUESTS[backend])


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    toy, dtype, backend = request.param
    return make_case(toy, dtype, backend)


def test_alone_equals_batched(case: Case) -> None:
    law1.check_alone_equals_batched(case.make_group, case.requests, case.expected)


def test_any_chunk_size(case: Case) -> None:
    law1.check_any_chunk_size(case.make_group, case.requests, case.expected, (1, 7, 64))


def test_prefix_hit_equals_recompute(case: Case) -> None:
    law1.check_prefix_hit_equals_recompute(case.make_group, case.requests, case.expected)


def test_decoded_kv_equals_prefilled(case: Case) -> None:
    law1.check_decoded_kv_equals_prefilled(case.make_group, case.requests[3])


def test_preempted_equals_undisturbed(case: Case) -> None:
    law1.check_preempted_equals_undisturbed(case.make_group, case.requests)


def test_microbatches(case: Case) -> None:
    law1.check_microbatches(case.make_group, case.requests, case.expected)


def test_tokens_without_logprobs(case: Case) -> None:
    law1.check_tokens_without_logprobs(case.make_group, case.requests, case.expected)


def test_two_runs(case: Case) -> None:
    law1.check_two_runs(case.make_group, case.requests)


@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_taken_apart(case: Case, num_microbatches: int) -> None:
    """Layer by layer over FFN and expert servers, not all layers in one operator."""
    assert case.model.spec.moe is not None
    experts = range(case.model.spec.moe.gate.num_experts)
    half = len(experts) // 2
    placement = [experts[:half], experts[half:]]
    with closing(ModuleThreads(case.model, num_ffn=1, placement=placement)) as servers:
        transport = servers.transport()
        group = build_dp_group(
            model=case.model,
            model_name="toy",
            config=law1.config(num_microbatches=num_microbatches),
            transport=transport,
        )
        assert law1.contents(law1.generate(group, case.requests)) == case.expected
        transport.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_thread_equals_two(dtype: str) -> None:
    case = make_case("glm4_moe", dtype, "cpu")
    for num_threads in (1, 2):
        make_group = factory(toy_model("glm4_moe", dtype, "cpu", num_threads))
        law1.check_alone_equals_batched(make_group, case.requests, case.expected)


class LeakyOps(ReferenceOps):
    """Breaks law 1: a row's result depends on how many rows come with it."""

    def linear(self, x: F32, weight: PackedWeight, bias: F32 | None = None) -> F32:
        factor = np.float32(1 + 1e-6 * x.shape[0])
        leaky: F32 = super().linear(x, weight, bias) * factor
        return leaky


def test_the_checks_notice_a_broken_law() -> None:
    case = Case(build_toy("glm4_moe", "float32", LeakyOps()), 2)
    with pytest.raises(AssertionError):
        law1.check_alone_equals_batched(case.make_group, case.requests, case.expected)
    with pytest.raises(AssertionError):
        law1.check_any_chunk_size(case.make_group, case.requests, case.expected, (3,))
    with pytest.raises(AssertionError):
        law1.check_microbatches(case.make_group, case.requests, case.expected)
