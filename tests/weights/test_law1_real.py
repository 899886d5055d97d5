"""Law 1 on the real model (upcycled SmolLM2), native operators, every precision.

The default run takes eight requests (every way of sampling, one long prompt), `-m soak` sixteen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import law1_harness as law1
from tests.weights.real_model import real_model
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.messages import GenerateRequest
from xdeepserve.models.decoder import Model
from xdeepserve.models.loader import load_model
from xdeepserve.ops import WeightDtype, get_ops

pytestmark = [pytest.mark.weights, pytest.mark.slow]


PARAMS = [
    pytest.param((dtype, num_requests), id=f"{dtype.value}-{num_requests}", marks=marks)
    for num_requests, marks in ((8, []), (16, [pytest.mark.soak]))
    for dtype in WeightDtype
]
"""Precision and number of requests."""


class Case:
    """A model, the requests, and what each request gets alone and unchunked."""

    def __init__(self, model: Model, num_requests: int) -> None:
        self.model = model
        self.requests = law1.mixed_requests(model.spec.vocab_size, num_requests, max_tokens=5)
        self.make_group = make_factory(model)
        self.expected = law1.solo(self.make_group, self.requests)


def make_factory(model: Model) -> law1.GroupFactory:
    def make(config: EngineConfig) -> DPGroup:
        return build_dp_group(model=model, model_name="moe", config=config)

    return make


@pytest.fixture(scope="module", params=PARAMS)
def case(request: pytest.FixtureRequest, moe_dir: Path) -> Case:
    dtype, num_requests = request.param
    return Case(real_model(moe_dir, dtype), num_requests)


CHECKS: dict[str, Callable[[law1.GroupFactory, list[GenerateRequest], dict], None]] = {
    "alone = in a batch": law1.check_alone_equals_batched,
    "chunked = unchunked": lambda make, requests, expected: law1.check_any_chunk_size(
        make, requests, expected, chunk_sizes=(5, 40)
    ),
    "prefix hit = recompute": law1.check_prefix_hit_equals_recompute,
    "microbatches": law1.check_microbatches,
}


@pytest.mark.parametrize("name", CHECKS)
def test_same_bits(name: str, case: Case) -> None:
    CHECKS[name](case.make_group, case.requests, case.expected)


def test_preempted_equals_undisturbed(case: Case) -> None:
    law1.check_preempted_equals_undisturbed(case.make_group, case.requests, num_tokens=14)


def test_two_runs(case: Case) -> None:
    law1.check_two_runs(case.make_group, case.requests[:6])


def test_one_thread_equals_two(case: Case, moe_dir: Path) -> None:
    ops = get_ops("cpu", num_threads=1)
    single = load_model(moe_dir, dtype=case.model.dtype, ops=ops, verify=False)
    law1.check_alone_equals_batched(make_factory(single), case.requests, case.expected)
