"""Law 1 on toy models: a mixture of experts and latent attention, in every precision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from tests import law1_harness as law1
from tests.toys import toy_model
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.messages import GenerateRequest
from xdeepserve.models.decoder import Model
from xdeepserve.testing.fake_clock import FakeClock

TOYS = ("glm4_moe", "deepseek_v3")
DTYPES = ("float32", "bf16", "int8")
NUM_REQUESTS = {"reference": 4, "cpu": 16}
"""Per operator backend; the reference is slow."""


def factory(model: Model) -> law1.GroupFactory:
    def make_group(config: EngineConfig, num_microbatches: int) -> DPGroup:
        return build_dp_group(
            model=model,
            model_name="toy",
            config=config,
            clock=FakeClock(),
            num_microbatches=num_microbatches,
        )

    return make_group


class Case:
    """A model, the requests, and what each request gets alone and unchunked."""

    def __init__(self, model: Model, count: int) -> None:
        self.make_group = factory(model)
        self.requests: Sequence[GenerateRequest] = law1.mixed_requests(model.spec.vocab_size, count)
        self.expected: dict[str, Any] = law1.solo(self.make_group, self.requests)


@cache
def make_case(toy: str, dtype: str, backend: str) -> Case:
    return Case(toy_model(toy, dtype, backend), NUM_REQUESTS[backend])


@pytest.fixture(
    params=[(b, t, d) for b in NUM_REQUESTS for t in TOYS for d in DTYPES], ids="-".join
)
def case(request: pytest.FixtureRequest) -> Case:
    backend, toy, dtype = request.param
    return make_case(toy, dtype, backend)


def test_alone_equals_batched(case: Case) -> None:
    law1.check_alone_equals_batched(case.make_group, case.requests, case.expected)


def test_any_chunk_size(case: Case) -> None:
    law1.check_any_chunk_size(case.make_group, case.requests, case.expected, (1, 3, 8, 29))


def test_prefix_hit_equals_recompute(case: Case) -> None:
    law1.check_prefix_hit_equals_recompute(case.make_group, case.requests, case.expected)


def test_decoded_kv_equals_prefilled(case: Case) -> None:
    law1.check_decoded_kv_equals_prefilled(case.make_group, case.requests[3])


def test_preempted_equals_undisturbed(case: Case) -> None:
    law1.check_preempted_equals_undisturbed(case.make_group, case.requests)


def test_microbatches(case: Case) -> None:
    law1.check_microbatches(case.make_group, case.requests, case.expected)


def test_two_runs(case: Case) -> None:
    law1.check_two_runs(case.make_group, case.requests)
