"""Law 1 on the real model (upcycled SmolLM2), native operators, every precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests import law1_harness as law1
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.messages import GenerateRequest
from xdeepserve.models.decoder import Model
from xdeepserve.models.loader import load_model
from xdeepserve.ops import WeightDtype, get_ops

pytestmark = [pytest.mark.weights, pytest.mark.slow]


@pytest.fixture(scope="module", params=list(WeightDtype))
def model(request: pytest.FixtureRequest, moe_dir: Path) -> Model:
    return load_model(moe_dir, dtype=request.param, ops=get_ops("cpu", num_threads=2))


def _requests(model: Model) -> list[GenerateRequest]:
    return law1.mixed_requests(model.spec.vocab_size, 16, max_tokens=5)


def _factory(model: Model) -> law1.GroupFactory:
    def make(config: EngineConfig) -> DPGroup:
        return build_dp_group(model=model, model_name="moe", config=config)

    return make


@pytest.fixture(scope="module")
def expected(model: Model) -> dict[str, object]:
    return law1.solo(_factory(model), _requests(model))


CHECKS: dict[str, Callable[[law1.GroupFactory, list[GenerateRequest], dict], None]] = {
    "alone = in a batch of 16": law1.check_alone_equals_batched,
    "chunked = unchunked": lambda make, requests, expected: law1.check_any_chunk_size(
        make, requests, expected, chunk_sizes=(5, 40)
    ),
    "prefix hit = recompute": law1.check_prefix_hit_equals_recompute,
    "microbatches": law1.check_microbatches,
}


@pytest.mark.parametrize("name", CHECKS)
def test_same_bits(name: str, model: Model, expected: dict[str, object]) -> None:
    requests = _requests(model)
    CHECKS[name](_factory(model), requests, expected)


def test_preempted_equals_undisturbed(model: Model) -> None:
    law1.check_preempted_equals_undisturbed(_factory(model), _requests(model))


def test_two_runs(model: Model) -> None:
    law1.check_two_runs(_factory(model), _requests(model)[:6])


def test_one_thread_equals_two(model: Model, moe_dir: Path, expected: dict[str, object]) -> None:
    requests = _requests(model)
    single = load_model(moe_dir, dtype=model.dtype, ops=get_ops("cpu", num_threads=1))
    law1.check_alone_equals_batched(_factory(single), requests, expected)
