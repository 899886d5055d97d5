"""Every family agrees with `transformers` in float32 (vectors made by make_golden.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xdeepserve.models.build import build_model
from xdeepserve.models.decoder import Model
from xdeepserve.models.families import parse_spec, without_absent_mtp
from xdeepserve.models.weights import InMemoryProvider
from xdeepserve.ops import WeightDtype, get_ops
from xdeepserve.testing.model_runner import SoloRunner
from xdeepserve.testing.toy_models import TOY_MODELS, toy_checkpoint

DATA = Path(__file__).parent / "data"
MAX_RELATIVE_ERROR = 1e-4


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def float32_model(name: str, backend: str) -> Model:
    checkpoint, ops = toy_checkpoint(name), get_ops(backend)
    spec = parse_spec(checkpoint.config)
    provider = InMemoryProvider(ops)
    return build_model(spec, provider, ops, checkpoint, dtype=WeightDtype.FLOAT32)


@pytest.mark.parametrize("name", TOY_MODELS)
def test_logits_and_greedy_tokens_match_transformers(name: str, backend: str) -> None:
    model = float32_model(name, backend)
    golden = np.load(DATA / f"{name}.npz")
    logits = SoloRunner(model).append(golden["prompt"])
    error = np.linalg.norm(logits - golden["logits"], axis=1)
    relative = error / np.linalg.norm(golden["logits"], axis=1)
    assert relative.max() < MAX_RELATIVE_ERROR
    greedy = SoloRunner(model).greedy(golden["prompt"], len(golden["greedy"]))
    assert greedy == golden["greedy"].tolist()


@pytest.mark.parametrize("name", TOY_MODELS)
def test_config_written_by_transformers_means_the_same(name: str) -> None:
    toy = toy_checkpoint(name)
    written = json.loads((DATA / f"{name}.config.json").read_text())
    # It also claims MTP layers, which `transformers` itself leaves out.
    assert parse_spec(without_absent_mtp(written, toy.names())) == parse_spec(toy.config)
