"""build_model asks for the same weights in the same order, and checks what it gets."""

from __future__ import annotations

import numpy as np
import pytest

from xdeepserve.errors import ModelFormatError
from xdeepserve.models.build import ModelBuilder, build_model
from xdeepserve.models.checkpoint_api import ArrayLoader, LinearLoader
from xdeepserve.models.decoder import Model
from xdeepserve.models.families import parse_spec
from xdeepserve.models.quantize import DtypePolicy
from xdeepserve.models.weights import InMemoryProvider, Weights
from xdeepserve.ops import Array, PackedWeight, WeightDtype, get_ops
from xdeepserve.testing.model_runner import SoloRunner
from xdeepserve.testing.toy_models import TOY_MODELS, ToyCheckpoint, toy_checkpoint

OPS = get_ops("reference")
PROMPT = [5, 300, 17, 42, 8, 5]


class RecordingProvider:
    """Packs on the first pass, hands the same weights out on the second without loading."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self._inner = InMemoryProvider(OPS)
        self._linears: dict[str, PackedWeight] = {}
        self._arrays: dict[str, Array] = {}

    def linear(self, name: str, load: LinearLoader, dtype: WeightDtype) -> PackedWeight:
        self.requests.append(name)
        if name not in self._linears:
            self._linears[name] = self._inner.linear(name, load, dtype)
        assert self._linears[name].dtype is dtype
        return self._linears[name]

    def array(self, name: str, load: ArrayLoader) -> Array:
        self.requests.append(name)
        if name not in self._arrays:
            self._arrays[name] = self._inner.array(name, load)
        return self._arrays[name]


def build(checkpoint: ToyCheckpoint, dtype: WeightDtype = WeightDtype.FLOAT32) -> Model:
    spec = parse_spec(checkpoint.config)
    return build_model(spec, InMemoryProvider(OPS), OPS, checkpoint, dtype=dtype)


@pytest.mark.parametrize("name", TOY_MODELS)
def test_second_build_needs_no_checkpoint(name: str) -> None:
    checkpoint, provider = toy_checkpoint(name), RecordingProvider()
    spec = parse_spec(checkpoint.config)
    first = build_model(spec, provider, OPS, checkpoint, dtype=WeightDtype.INT8)
    requests = provider.requests[:]
    assert len(requests) == len(set(requests))
    provider.requests.clear()
    second = build_model(spec, provider, OPS, None, dtype=WeightDtype.INT8)
    assert provider.requests == requests
    logits = SoloRunner(first).append(PROMPT)
    np.testing.assert_array_equal(SoloRunner(second).append(PROMPT), logits)


def test_read_without_checkpoint_says_the_cache_is_incomplete() -> None:
    spec = parse_spec(toy_checkpoint("llama").config)
    with pytest.raises(ModelFormatError, match="delete the cache file"):
        build_model(spec, InMemoryProvider(OPS), OPS, None, dtype=WeightDtype.FLOAT32)


@pytest.mark.parametrize("name", TOY_MODELS)
def test_every_tensor_is_needed(name: str) -> None:
    for missing in toy_checkpoint(name).names():
        checkpoint = toy_checkpoint(name)
        del checkpoint.shapes[missing]
        with pytest.raises(ModelFormatError, match="missing"):
            build(checkpoint)


@pytest.mark.parametrize("name", ["llama3", "qwen3_moe", "deepseek_v3"])
def test_every_shape_is_checked(name: str) -> None:
    for wrong, shape in toy_checkpoint(name).shapes.items():
        checkpoint = toy_checkpoint(name)
        checkpoint.shapes[wrong] = (shape[0] + 1, *shape[1:])
        with pytest.raises(ModelFormatError, match=r"has shape .* config\.json says"):
            build(checkpoint)


def test_fused_expert_tensors_are_read() -> None:
    separate = toy_checkpoint("glm4_moe")
    tensors = separate.tensors()
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        parts = {
            part: np.stack([tensors.pop(f"{prefix}.{e}.{part}.weight") for e in range(8)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        gate_up = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
        tensors[f"{prefix}.gate_up_proj"] = gate_up
        tensors[f"{prefix}.down_proj"] = parts["down_proj"]

    class Fused(ToyCheckpoint):
        def tensor(self, name: str) -> Array:
            return tensors[name]

    fused = Fused(separate.config, {name: t.shape for name, t in tensors.items()})
    expected = SoloRunner(build(separate)).append(PROMPT)
    np.testing.assert_array_equal(SoloRunner(build(fused)).append(PROMPT), expected)


def test_precision_of_each_weight() -> None:
    model = build(toy_checkpoint("deepseek_v3"), WeightDtype.INT8)
    layer = model.layers[1]
    assert layer.experts is not None
    assert layer.ffn is not None
    assert layer.attention.layer.frame.router is not None
    assert layer.experts.gate_up.dtype is OPS.outlier_dtype  # the reference has w8a8g64 everywhere
    assert layer.ffn.down.dtype is OPS.outlier_dtype
    assert layer.attention.layer.frame.router.weight.dtype is WeightDtype.FLOAT32
    assert model.embedding.table.dtype == np.uint16
    assert build(toy_checkpoint("llama")).embedding.table.dtype == np.float32


def test_single_units_can_be_built() -> None:
    checkpoint = toy_checkpoint("glm4_moe")
    weights = Weights(
        InMemoryProvider(OPS), checkpoint, DtypePolicy(WeightDtype.BF16, 4, OPS.outlier_dtype)
    )
    builder = ModelBuilder(parse_spec(checkpoint.config), weights, OPS, max_positions=64)
    assert builder.experts(0) is None
    experts = builder.experts(1)
    assert experts is not None
    assert experts.num_experts == 8


def test_rope_table_is_limited_to_what_is_served() -> None:
    checkpoint = toy_checkpoint("llama")
    spec = parse_spec(checkpoint.config)
    provider = InMemoryProvider(OPS)
    model = build_model(
        spec, provider, OPS, checkpoint, dtype=WeightDtype.FLOAT32, max_positions=32
    )
    logits = SoloRunner(model).append(PROMPT)
    np.testing.assert_array_equal(logits, SoloRunner(build(checkpoint)).append(PROMPT))
