"""The precision of each weight follows from its name."""

from __future__ import annotations

import pytest

from xdeepserve.models.quantize import DtypePolicy
from xdeepserve.ops import WeightDtype

F32, BF16, INT8 = WeightDtype.FLOAT32, WeightDtype.BF16, WeightDtype.INT8
INT4, A16, G64 = WeightDtype.INT4, WeightDtype.W8A16, WeightDtype.W8A8G64


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.router.weight", (F32, F32, F32, F32)),
        ("layers.3.router.weight", (F32, F32, F32, F32)),
        ("layers.0.attention.qkv", (F32, BF16, A16, G64)),
        ("layers.1.attention.key_absorb", (F32, BF16, A16, G64)),
        ("layers.0.attention.output", (F32, BF16, A16, G64)),
        ("layers.1.experts.gate_up", (F32, BF16, INT8, G64)),
        ("layers.1.ffn.down", (F32, BF16, INT8, G64)),
        ("layers.3.ffn.down", (F32, BF16, A16, G64)),
        ("layers.3.experts.gate_up", (F32, BF16, A16, G64)),
        ("head.lm_head", (F32, BF16, A16, G64)),
    ],
)
def test_linear(name: str, expected: tuple[WeightDtype, ...]) -> None:
    cases = ((F32, A16), (BF16, A16), (INT8, A16), (INT8, G64))
    found = tuple(DtypePolicy(dtype, 4, outliers).linear(name) for dtype, outliers in cases)
    assert found == expected


def test_first_tenth_and_last_layer_hold_outliers() -> None:
    policy = DtypePolicy(INT8, 30, A16)
    kept = [idx for idx in range(30) if policy.linear(f"layers.{idx}.ffn.down") is A16]
    assert kept == [0, 1, 2, 29]


@pytest.mark.parametrize("outliers", [A16, G64])
@pytest.mark.parametrize("name", ["ffn.gate_up", "experts.down", "attention.qkv", "router.weight"])
@pytest.mark.parametrize("idx", [0, 2, 3, 28, 29])
def test_int4_is_for_inner_ffns(idx: int, name: str, outliers: WeightDtype) -> None:
    weight = f"layers.{idx}.{name}"
    int8, int4 = (DtypePolicy(dtype, 30, outliers).linear(weight) for dtype in (INT8, INT4))
    is_inner = idx in (3, 28) and name in ("ffn.gate_up", "experts.down")
    assert int4 is (INT4 if is_inner else int8)


def test_layer_13_is_not_layer_1() -> None:
    assert DtypePolicy(INT8, 2, A16).linear("layers.13.ffn.down") is INT8


def test_embedding() -> None:
    found = [DtypePolicy(dtype, 4, A16).embedding for dtype in WeightDtype]
    assert found == [F32] + [BF16] * (len(WeightDtype) - 1)
