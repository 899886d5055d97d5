"""bf16 and int8 stay close to float32 on real text: mean KL of the next-token distribution.

The default run takes the beginning of the text, `-m soak` the whole of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests import law1_harness as law1
from tests.weights.real_model import real_model
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.decoder import forward
from xdeepserve.ops import F32, AttentionBatch, WeightDtype
from xdeepserve.text.chat_template import ChatTemplate
from xdeepserve.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.weights, pytest.mark.slow]

TEXT = Path(__file__).with_name("alice.txt")
BLOCK_SIZE = 16
LIMITS = {"bf16": 1e-3, "int8": 2e-2}


def log_probabilities(model_dir: Path, dtype: str, num_chars: int) -> F32:
    """[T, V] log softmax at every position of the first `num_chars` of the text."""
    text = TEXT.read_text()[:num_chars]
    ids = Tokenizer.from_folder(model_dir).encode(text, add_special_tokens=False)
    num_tokens = len(ids)
    model = real_model(model_dir, WeightDtype(dtype))
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    everything = np.arange(num_tokens, dtype=np.int32)
    batch = ForwardBatch(
        token_ids=np.array(ids, np.int32),
        attention=AttentionBatch(
            query_start=np.array([0, num_tokens], np.int32),
            seq_lens=np.array([num_tokens], np.int32),
            block_tables=np.arange(num_blocks, dtype=np.int32)[None],
            positions=everything,
            slot_mapping=everything,
        ),
        logits_rows=everything,
    )
    logits = forward(model, batch, model.new_kv(num_blocks, BLOCK_SIZE))
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: F32 = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


@pytest.mark.parametrize(
    "num_chars", [1200, pytest.param(sys.maxsize, id="all", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("name", ["dense_dir", "moe_dir"])
def test_mean_kl_on_real_text(name: str, num_chars: int, request: pytest.FixtureRequest) -> None:
    model_dir: Path = request.getfixturevalue(name)
    exact = log_probabilities(model_dir, "float32", num_chars)
    probabilities = np.exp(exact)
    for dtype, limit in LIMITS.items():
        rounded = log_probabilities(model_dir, dtype, num_chars)
        divergence = float((probabilities * (exact - rounded)).sum(axis=1).mean())
        print(f"\n{name} {dtype}: mean KL {divergence:.2e} over {len(exact)} positions")
        assert 0 < divergence < limit


@pytest.mark.parametrize("dtype", WeightDtype)
def test_knows_the_capital_of_france(dtype: WeightDtype, moe_dir: Path) -> None:
    tokenizer = Tokenizer.from_folder(moe_dir)
    assert tokenizer.chat_template is not None
    with ChatTemplate(tokenizer.chat_template, special_tokens=tokenizer.special_tokens) as template:
        text = template.render([{"role": "user", "content": "What is the capital of France?"}])
    model = real_model(moe_dir, dtype)
    group = build_dp_group(model=model, model_name="m", config=law1.config(num_kv_blocks=1024))
    prompt = tokenizer.encode(text, add_special_tokens=False)
    answer = law1.generate(group, [law1.request("q", prompt, max_tokens=24)])["q"]
    assert "Paris" in tokenizer.decode(answer.token_ids)
