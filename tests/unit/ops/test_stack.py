"""All layers as one operator: bit for bit what plain operators give in a row."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.unit.ops.cases import ISAS, make_cpu, normal
from tests.unit.ops.layers import (
    EXPERTS,
    HIDDEN,
    assert_same,
    copy_of,
    make_decoder_layer,
    make_gqa,
    make_mla,
    make_mlp,
    paged_for,
)
from xdeepserve import _native
from xdeepserve.ops import (
    F32,
    AttentionBatch,
    AttentionLayer,
    DecoderLayer,
    DecoderStack,
    KVLayer,
    Mlp,
    Ops,
    WeightDtype,
    composed,
)
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.cpu_views import layer_view, weight_view
from xdeepserve.ops.reference import ReferenceOps

KINDS = ["gqa", "mla", "experts only"]


def make_attention(
    ops: Ops, rng: np.random.Generator, kind: str, dtype: WeightDtype, *, plain: bool
) -> AttentionLayer:
    make = make_mla if kind == "mla" else make_gqa
    return make(ops, rng, dtype, plain=plain)


def make_stack(
    ops: Ops, rng: np.random.Generator, kind: str, dtype: WeightDtype = WeightDtype.BF16
) -> DecoderStack:
    """A dense layer, then two with experts; FFN and experts are of another precision, too."""
    layers = []
    for idx, ffn_dtype in enumerate((WeightDtype.BF16, dtype, dtype)):
        attention = make_attention(ops, rng, kind, dtype, plain=idx == 0)
        layers.append(
            make_decoder_layer(ops, rng, attention, ffn_dtype, shared=kind != "experts only")
        )
    return DecoderStack(tuple(layers))


class Inputs:
    """Hidden states and a batch of LENGTHS, over a cache per layer."""

    def __init__(
        self, stack: DecoderStack, rng: np.random.Generator, kv_dtype: type = np.float32
    ) -> None:
        paged = paged_for(stack.layers[0].attention, rng, kv_dtype)
        self.batch = paged.batch
        self.caches = [copy_of(paged.kv) for _ in stack.layers]
        self.hidden = normal(rng, paged.num_tokens, HIDDEN)

    def run(self, ops: Ops, stack: DecoderStack) -> tuple[F32, list[KVLayer]]:
        caches = [copy_of(kv) for kv in self.caches]
        return ops.decoder_layers(stack, self.hidden, self.batch, caches), caches

    def compose(self, ops: Ops, stack: DecoderStack) -> tuple[F32, list[KVLayer]]:
        caches = [copy_of(kv) for kv in self.caches]
        return composed.decoder_layers(ops, stack, self.hidden, self.batch, caches), caches


@pytest.mark.parametrize(
    ("kind", "kv_dtype"),
    [(kind, dtype) for kind in KINDS for dtype in (np.float32, np.uint16)] + [("gqa", np.int8)],
)
@pytest.mark.parametrize("dtype", list(WeightDtype))
def test_a_stack_equals_its_operators(
    cpu: CpuOps, rng: np.random.Generator, kind: str, dtype: WeightDtype, kv_dtype: type
) -> None:
    stack = make_stack(cpu, rng, kind, dtype)
    inputs = Inputs(stack, rng, kv_dtype)
    before = inputs.hidden.copy()
    got, caches = inputs.run(cpu, stack)
    want, other_caches = inputs.compose(cpu, stack)
    np.testing.assert_array_equal(got, want)
    for kv, other in zip(caches, other_caches, strict=True):
        assert_same(kv, other)
    np.testing.assert_array_equal(inputs.hidden, before)
    again, _ = inputs.run(cpu, stack)
    np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", ISAS)
def test_thread_count_does_not_touch_bits(isa: str, kind: str) -> None:
    results = []
    for num_threads in (1, 2, 3):
        ops, rng = make_cpu(isa=isa, num_threads=num_threads), np.random.default_rng(4)
        stack = make_stack(ops, rng, kind)
        results.append(Inputs(stack, rng).run(ops, stack)[0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_agrees(kind: str) -> None:
    """To float32 rounding: routers could choose otherwise for a tie only."""
    results = []
    for ops in (ReferenceOps(), make_cpu()):
        rng = np.random.default_rng(4)
        stack = make_stack(ops, rng, kind, WeightDtype.FLOAT32)
        routed = DecoderStack(stack.layers[1:])
        results.append(Inputs(routed, rng).run(ops, routed)[0])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-2)


def test_a_step_of_no_tokens(cpu: CpuOps, rng: np.random.Generator) -> None:
    stack = make_stack(cpu, rng, "gqa")
    caches = Inputs(stack, rng).caches
    none = np.zeros(0, np.int32)
    batch = AttentionBatch(np.zeros(1, np.int32), none, none[:, None], none, none)
    out = cpu.decoder_layers(stack, np.zeros((0, HIDDEN), np.float32), batch, caches)
    assert out.shape == (0, HIDDEN)


def test_inputs_that_do_not_fit_are_refused(cpu: CpuOps, rng: np.random.Generator) -> None:
    stack = make_stack(cpu, rng, "gqa")
    inputs = Inputs(stack, rng)
    with pytest.raises(ValueError, match="number of caches is 2; it must be 3"):
        cpu.decoder_layers(stack, inputs.hidden, inputs.batch, inputs.caches[:2])
    with pytest.raises(ValueError, match="hidden_states must be"):
        cpu.decoder_layers(stack, inputs.hidden[1:], inputs.batch, inputs.caches)
    latents = Inputs(make_stack(cpu, rng, "mla"), rng).caches[0]
    with pytest.raises(ValueError, match="needs a value cache"):
        cpu.decoder_layers(stack, inputs.hidden, inputs.batch, [*inputs.caches[:2], latents])
    short = KVLayer(inputs.caches[2].k[:1].copy(), inputs.caches[2].v[:1].copy())
    with pytest.raises(ValueError, match="a block that the cache lacks"):
        cpu.decoder_layers(stack, inputs.hidden, inputs.batch, [*inputs.caches[:2], short])


def test_layers_that_do_not_fit_are_refused(cpu: CpuOps, rng: np.random.Generator) -> None:
    bf16 = WeightDtype.BF16
    dense, routed = (make_gqa(cpu, rng, bf16, plain=plain) for plain in (True, False))
    mlp, experts = make_mlp(cpu, rng, bf16), make_mlp(cpu, rng, bf16, groups=EXPERTS)
    inputs = Inputs(DecoderStack((DecoderLayer(dense, mlp, None),)), rng)

    def refuse(message: str, *layers: DecoderLayer) -> None:
        with pytest.raises(ValueError, match=message):
            inputs.run(cpu, DecoderStack(layers))

    refuse("a dense FFN or experts", DecoderLayer(dense, None, None))
    refuse("just where it has a router", DecoderLayer(dense, mlp, experts))
    refuse("just where it has a router", DecoderLayer(routed, mlp, None))
    refuse("number of experts in gate_up is 8; it must be 1", DecoderLayer(dense, experts, None))
    refuse("number of experts in gate_up is 1; it must be 8", DecoderLayer(routed, None, mlp))
    refuse("number of experts in down", DecoderLayer(dense, Mlp(mlp.gate_up, experts.down), None))
    wide = make_mlp(cpu, rng, bf16, width=HIDDEN + 1)
    refuse("inputs of gate_up", DecoderLayer(dense, wide, None))
    refuse("output features of down", DecoderLayer(dense, Mlp(mlp.gate_up, wide.down), None))
    thin = cpu.pack(normal(rng, HIDDEN, 23), dtype=bf16)
    refuse("output features of gate_up", DecoderLayer(dense, Mlp(mlp.gate_up, thin), None))
    narrow = dataclasses.replace(
        dense,
        frame=dataclasses.replace(
            dense.frame, input_norm=normal(rng, 32), ffn_norm=normal(rng, 32)
        ),
        qkv=cpu.pack(normal(rng, dense.qkv.shape[1], 32), dtype=bf16),
        output=cpu.pack(normal(rng, 32, dense.output.shape[2]), dtype=bf16),
    )
    first = DecoderLayer(dense, mlp, None)
    refuse("width of a layer is 32; it must be 40", first, DecoderLayer(narrow, mlp, None))


def test_the_native_stack_checks_what_its_callers_cannot_do_wrong(
    cpu: CpuOps, rng: np.random.Generator
) -> None:
    layer = DecoderLayer(
        make_gqa(cpu, rng, WeightDtype.BF16, plain=True), make_mlp(cpu, rng, WeightDtype.BF16), None
    )
    inputs, stack = Inputs(DecoderStack((layer,)), rng), _native.Stack()
    with pytest.raises(ValueError, match="at least one layer"):
        inputs.run(cpu, dataclasses.replace(DecoderStack((layer,)), layers=()))
    assert layer.ffn is not None
    with pytest.raises(ValueError, match="gate_up and down go together"):
        stack.add_layer(
            layer_view(layer.attention), weight_view(layer.ffn.gate_up), None, None, None
        )
