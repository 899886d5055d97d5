"""bf16, int8 and int4 stay close to float32 on real text: mean KL of the next-token distribution.

The default run takes the beginning of the text, `-m soak` the whole of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests import law1_harness as law1
from tests.weights.real_model import real_model
from tests.weights.shuffled import ShuffledCheckpoint
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.build import build_model
from xdeepserve.models.checkpoint import open_checkpoint
from xdeepserve.models.decoder import Model, forward
from xdeepserve.models.families import parse_spec
from xdeepserve.models.weights import InMemoryProvider
from xdeepserve.ops import F32, AttentionBatch, WeightDtype, get_ops
from xdeepserve.text.chat_template import ChatTemplate
from xdeepserve.text.tokenizer import Tokenizer

pytestmark = [pytest.mark.weights, pytest.mark.slow]

TEXT = Path(__file__).with_name("alice.txt")
BLOCK_SIZE = 16
LIMITS = {
    "bf16": 1e-3,
    "w8a16": 8e-3,
    "w8a8g64": 1.5e-2,
    "int8": 2e-2,
    "int4": 1.2e-2,
    "float32+int8": 5e-3,
    "int8+int8": 2e-2,
}
"""By precision of the weights, and of the cache where it is not the weights' own. int4 finds the
4-bit values that this model was stored in; see SHUFFLED_LIMIT."""

SHUFFLED_LIMIT = 1.5e-1
"""int4 where there is nothing to find; float32 shuffled is the model itself."""


def log_probabilities(model_dir: Path, model: Model, num_chars: int) -> F32:
    """[T, V] log softmax at every position of the first `num_chars` of the text."""
    text = TEXT.read_text()[:num_chars]
    ids = Tokenizer.from_folder(model_dir).encode(text, add_special_tokens=False)
    num_tokens = len(ids)
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


def mean_kl(exact: F32, rounded: F32) -> float:
    """Nats, mean over positions, of two log softmax."""
    return float((np.exp(exact) * (exact - rounded)).sum(axis=1).mean())


def shuffled(model_dir: Path, dtype: WeightDtype) -> Model:
    """The model with its channels permuted."""
    checkpoint = ShuffledCheckpoint(open_checkpoint(model_dir))
    ops, spec = get_ops("cpu", num_threads=2), parse_spec(checkpoint.config)
    return build_model(spec, InMemoryProvider(ops), ops, checkpoint, dtype=dtype)


@pytest.mark.parametrize(
    "num_chars", [1200, pytest.param(sys.maxsize, id="all", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("name", ["dense_dir", "moe_dir"])
def test_mean_kl_on_real_text(name: str, num_chars: int, request: pytest.FixtureRequest) -> None:
    model_dir: Path = request.getfixturevalue(name)
    exact = log_probabilities(model_dir, real_model(model_dir, WeightDtype.FLOAT32), num_chars)
    for precision, limit in LIMITS.items():
        dtype, _, cache = precision.partition("+")
        model = real_model(model_dir, WeightDtype(dtype)).with_kv_cache(cache or "auto")
        divergence = mean_kl(exact, log_probabilities(model_dir, model, num_chars))
        print(f"\n{name} {precision}: mean KL {divergence:.2e} over {len(exact)} positions")
        assert 0 < divergence < limit


@pytest.mark.parametrize("name", ["dense_dir", "moe_dir"])
def test_mean_kl_of_int4_off_the_grid(name: str, request: pytest.FixtureRequest) -> None:
    model_dir: Path = request.getfixturevalue(name)
    exact = log_probabilities(model_dir, real_model(model_dir, WeightDtype.FLOAT32), 1200)
    found = {
        dtype: mean_kl(exact, log_probabilities(model_dir, shuffled(model_dir, dtype), 1200))
        for dtype in (WeightDtype.FLOAT32, WeightDtype.INT4)
    }
    print(f"\n{name} shuffled: mean KL {found}")
    assert abs(found[WeightDtype.FLOAT32]) < 1e-5  # the same function
    assert 1e-2 < found[WeightDtype.INT4] < SHUFFLED_LIMIT


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
