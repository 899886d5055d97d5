"""Law 1 on whole models: a token's logits depend on its own context alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.toys import toy_model
from xdeepserve.errors import ConfigError
from xdeepserve.models.build import build_model
from xdeepserve.models.decoder import Model, forward, layer_steps, local_ffn
from xdeepserve.models.families import parse_spec
from xdeepserve.models.weights import InMemoryProvider
from xdeepserve.ops import F32, WeightDtype, get_ops
from xdeepserve.testing.model_runner import Chunk, SoloRunner, step_batch
from xdeepserve.testing.toy_models import toy_checkpoint

PROMPT = [(7 * i * i + 3) % 320 for i in range(37)]
OTHERS = [[(11 * i + 5 * s) % 320 for i in range(9 + 8 * s)] for s in range(4)]
BLOCK_SIZE = 4

MODELS = ("llama", "glm4_moe", "deepseek_v3")


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(WeightDtype))
def dtype(request: pytest.FixtureRequest) -> WeightDtype:
    return WeightDtype(request.param)


def toy(name: str, backend: str, dtype: WeightDtype) -> Model:
    checkpoint, ops = toy_checkpoint(name), get_ops(backend)
    provider = InMemoryProvider(ops)
    return build_model(parse_spec(checkpoint.config), provider, ops, checkpoint, dtype=dtype)


@pytest.mark.parametrize("name", MODELS)
def test_chunked_equals_unchunked(name: str, backend: str, dtype: WeightDtype) -> None:
    model = toy(name, backend, dtype)
    whole = SoloRunner(model).append(PROMPT)
    assert whole.shape == (len(PROMPT), 320)
    for size in (1, 5, 16):
        runner = SoloRunner(model, block_size=BLOCK_SIZE)
        chunks = [PROMPT[at : at + size] for at in range(0, len(PROMPT), size)]
        np.testing.assert_array_equal(np.concatenate([runner.append(c) for c in chunks]), whole)


@pytest.mark.parametrize("name", MODELS)
def test_in_a_batch_equals_alone(name: str, backend: str, dtype: WeightDtype) -> None:
    model = toy(name, backend, dtype)
    prompts = [*OTHERS[:2], PROMPT, *OTHERS[2:]]
    kv = model.new_kv(64, BLOCK_SIZE)
    tables = [range(12 * i + 11, 12 * i - 1, -1) for i in range(len(prompts))]
    chunks = [Chunk(p, 0, t) for p, t in zip(prompts, tables, strict=True)]
    logits = forward(model, step_batch(chunks, BLOCK_SIZE), kv)
    start = sum(len(p) for p in prompts[:2])
    alone = SoloRunner(model).append(PROMPT)
    np.testing.assert_array_equal(logits[start : start + len(PROMPT)], alone)


def test_interleaved_microbatches_equal_one_batch(backend: str, dtype: WeightDtype) -> None:
    model = toy("glm4_moe", backend, dtype)
    chunks = [Chunk(PROMPT, 0, range(10)), Chunk(OTHERS[1], 0, range(10, 20))]
    together = forward(model, step_batch(chunks, BLOCK_SIZE), model.new_kv(20, BLOCK_SIZE))
    kv = model.new_kv(20, BLOCK_SIZE)
    batches = [step_batch([chunk], BLOCK_SIZE) for chunk in chunks]
    flights = [layer_steps(model.attention_side, batch, kv) for batch in batches]
    calls = [next(flight) for flight in flights]
    finals: dict[int, F32] = {}
    while len(finals) < len(flights):
        for idx, flight in enumerate(flights):
            try:
                calls[idx] = flight.send(local_ffn(model, calls[idx]))
            except StopIteration as finished:
                finals[idx] = finished.value
    rows = [model.head(finals[idx], batch.logits_rows) for idx, batch in enumerate(batches)]
    np.testing.assert_array_equal(np.concatenate(rows), together)


@pytest.mark.parametrize("name", [*MODELS, "qwen3_moe", "mixtral", "deepseek_v3_plain"])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_the_stack_equals_the_layers_one_by_one(
    name: str, dtype: WeightDtype, num_threads: int
) -> None:
    model = toy_model(name, str(dtype), "cpu", num_threads)
    kv, other = model.new_kv(40, BLOCK_SIZE), model.new_kv(40, BLOCK_SIZE)
    prompts = [PROMPT, *OTHERS[:3]]
    tables = [range(10 * i, 10 * i + 10) for i in range(len(prompts))]
    first = [Chunk(p[:-1], 0, t) for p, t in zip(prompts[1:], tables[1:], strict=True)]
    last = [Chunk(p[-1:], len(p) - 1, t) for p, t in zip(prompts[1:], tables[1:], strict=True)]
    for chunks in (first, [*last, Chunk(PROMPT, 0, tables[0])]):  # prefill, then decode with it
        batch = step_batch(chunks, BLOCK_SIZE)
        embedded = model.embedding(batch.token_ids)
        hidden = model.ops.decoder_layers(model.stack, embedded, batch.attention, kv)
        expected = forward(model, batch, other)
        np.testing.assert_array_equal(model.head(hidden, batch.logits_rows), expected)
    for mine, theirs in zip(kv, other, strict=True):
        np.testing.assert_array_equal(mine.k, theirs.k)
        if mine.v is not None:
            np.testing.assert_array_equal(mine.v, theirs.v)


def test_calls_name_their_layer_and_experts() -> None:
    model = toy("glm4_moe", "reference", WeightDtype.FLOAT32)
    batch = step_batch([Chunk(PROMPT, 0, range(10))], BLOCK_SIZE)
    steps = layer_steps(model.attention_side, batch, model.new_kv(10, BLOCK_SIZE))
    dense = next(steps)
    assert (dense.layer_idx, dense.topk_ids, dense.topk_weights) == (0, None, None)
    routed = steps.send(local_ffn(model, dense))
    assert routed.layer_idx == 1
    assert routed.topk_ids is not None
    assert routed.topk_weights is not None
    assert routed.topk_ids.shape == routed.topk_weights.shape == (len(PROMPT), 2)
    np.testing.assert_allclose(routed.topk_weights.sum(axis=1), 1.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "num_bytes"),
    [
        ("llama", WeightDtype.FLOAT32, 2 * 2 * 2 * 16 * 4),
        ("llama", WeightDtype.BF16, 2 * 2 * 2 * 16 * 2),
        ("deepseek_v3", WeightDtype.INT8, 3 * (32 + 16) * 2),
    ],
)
def test_kv_size(name: str, dtype: WeightDtype, num_bytes: int) -> None:
    _check_kv_size(toy(name, "reference", dtype), num_bytes)


def test_size_of_an_int8_cache() -> None:
    model = toy("llama", "reference", WeightDtype.BF16).with_kv_cache("int8")
    _check_kv_size(model, 2 * 2 * 2 * (16 + 4))


def _check_kv_size(model: Model, num_bytes: int) -> None:
    assert model.kv_format.bytes_per_token == num_bytes
    layers = model.new_kv(3, 8)
    arrays = [a for layer in layers for a in (layer.k, layer.v, layer.scales) if a is not None]
    assert sum(array.nbytes for array in arrays) == 3 * 8 * num_bytes


def test_caches_in_another_precision_than_the_weights() -> None:
    model = toy("llama", "reference", WeightDtype.BF16)
    exact = SoloRunner(model.with_kv_cache("float32")).append(PROMPT)
    rounded = {dtype: SoloRunner(model.with_kv_cache(dtype)) for dtype in ("auto", "bf16", "int8")}
    logits = {dtype: runner.append(PROMPT) for dtype, runner in rounded.items()}
    np.testing.assert_array_equal(logits["auto"], logits["bf16"])
    for dtype in ("bf16", "int8"):
        error = np.abs(logits[dtype] - exact).max()
        assert 0 < error < 0.05 * np.abs(exact).max()


def test_latents_are_not_rounded_to_int8() -> None:
    model = toy("deepseek_v3", "reference", WeightDtype.BF16)
    with pytest.raises(ConfigError, match="kv_cache_dtype='int8' is not for deepseek_v3"):
        model.with_kv_cache("int8")
