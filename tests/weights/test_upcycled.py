"""The upcycled MoE computes the dense model's function.

The default run takes the first tokens, `-m soak` the full length.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import law1_harness as law1
from tests.weights.real_model import real_model
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.ops import WeightDtype
from xdeepserve.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.weights, pytest.mark.slow]

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "The three most important inventions of the nineteenth century were",
)


def _greedy(model_dir: Path, num_tokens: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(model_dir)
    model = real_model(model_dir, WeightDtype.FLOAT32)
    group = build_dp_group(model=model, model_name="m", config=law1.config(num_kv_blocks=512))
    requests = [
        law1.request(str(idx), tokenizer.encode(text), max_tokens=num_tokens, ignore_eos=True)
        for idx, text in enumerate(PROMPTS)
    ]
    return [result.token_ids for result in law1.generate(group, requests).values()]


@pytest.mark.parametrize("num_tokens", [40, pytest.param(200, marks=pytest.mark.soak)])
def test_dense_and_moe_give_the_same_greedy_tokens(
    num_tokens: int, dense_dir: Path, moe_dir: Path
) -> None:
    dense, moe = _greedy(dense_dir, num_tokens), _greedy(moe_dir, num_tokens)
    assert all(len(ids) == num_tokens for ids in dense)
    assert len({tuple(ids) for ids in dense}) == len(PROMPTS)
    assert moe == dense
