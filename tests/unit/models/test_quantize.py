"""The precision of each weight follows from its name."""

from __future__ import annotations

import pytest

from xdeepserve.models.quantize import DtypePolicy
from xdeepserve.ops import WeightDtype

F32, BF16, INT8 = WeightDtype.FLOAT32, WeightDtype.BF16, WeightDtype.INT8
INT4, W8 = WeightDtype.INT4, WeightDtype.W8A16


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.router.weight", (F32, F32, F32)),
        ("layers.3.router.weight", (F32, F32, F32)),
        ("layers.0.attention.qkv", (F32, BF16, W8)),
        ("layers.1.attention.key_absorb", (F32, BF16, W8)),
        ("layers.0.attention.output", (F32, BF16, W8)),
        ("layers.1.experts.gate_up", (F32, BF16, INT8)),
        ("layers.1.ffn.down", (F32, BF16, INT8)),
        ("layers.3.ffn.down", (F32, BF16, W8)),
        ("layers.3.experts.gate_up", (F32, BF16, W8)),
        ("head.lm_head", (F32, BF16, W8)),
    ],
)
def test_linear(name: str, expected: tuple[WeightDtype, WeightDtype, WeightDtype]) -> None:
    found = tuple(DtypePolicy(dtype, num_layers=4).linear(name) for dtype in (F32, BF16, INT8))
    assert found == expected


def test_first_tenth_and_last_layer_keep_bf16_activations() -> None:
    policy = DtypePolicy(INT8, num_layers=30)
    kept = [idx for idx in range(30) if policy.linear(f"layers.{idx}.ffn.down") is W8]
    assert kept == [0, 1, 2, 29]


@pytest.mark.parametrize("name", ["ffn.gate_up", "experts.down", "attention.qkv", "router.weight"])
@pytest.mark.parametrize("idx", [0, 2, 3, 28, 29])
def test_int4_is_what_int8_would_be(idx: int, name: str) -> None:
    weight = f"layers.{idx}.{name}"
    int8, int4 = (DtypePolicy(dtype, num_layers=30).linear(weight) for dtype in (INT8, INT4))
    assert int4 is (INT4 if int8 is INT8 else int8)


def test_layer_13_is_not_layer_1() -> None:
    assert DtypePolicy(INT8, num_layers=2).linear("layers.13.ffn.down") is INT8


def test_embedding() -> None:
    found = [DtypePolicy(dtype, 4).embedding for dtype in WeightDtype]
    assert found == [F32, BF16, BF16, BF16, BF16]
