"""The upcycled MoE computes the dense model's function."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import law1_harness as law1
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.models.loader import load_model
from xdeepserve.ops import WeightDtype, get_ops
from xdeepserve.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.weights, pytest.mark.slow]

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "The three most important inventions of the nineteenth century were",
)
NUM_TOKENS = 200


def _greedy(model_dir: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(model_dir)
    model = load_model(model_dir, dtype=WeightDtype.FLOAT32, ops=get_ops("cpu"))
    group = build_dp_group(model=model, model_name="m", config=law1.config(num_kv_blocks=512))
    requests = [
        law1.request(str(idx), tokenizer.encode(text), max_tokens=NUM_TOKENS, ignore_eos=True)
        for idx, text in enumerate(PROMPTS)
    ]
    return [result.token_ids for result in law1.generate(group, requests).values()]


def test_dense_and_moe_give_the_same_200_greedy_tokens(dense_dir: Path, moe_dir: Path) -> None:
    dense, moe = _greedy(dense_dir), _greedy(moe_dir)
    assert all(len(ids) == NUM_TOKENS for ids in dense)
    assert len({tuple(ids) for ids in dense}) == len(PROMPTS)
    assert moe == dense
