"""Routing, combining, sampling, log probabilities: native against reference, and law 1."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.ops.cases import ids, normal
from xdeepserve.ops import GateSpec, Penalties, SamplingBatch
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.reference import ReferenceOps

SPECS = [
    GateSpec(8, 2, "softmax", True),
    GateSpec(8, 8, "softmax", False, scaling=2.5),
    GateSpec(60, 4, "softmax", False),
    GateSpec(8, 2, "sigmoid", True),
    GateSpec(64, 6, "sigmoid", True, num_groups=8, topk_groups=3, scaling=2.5),
    GateSpec(6, 2, "sigmoid", False, num_groups=6, topk_groups=2),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_gate_agrees_with_reference(
    cpu: CpuOps,
    reference: ReferenceOps,
    rng: np.random.Generator,
    spec: GateSpec,
    with_bias: bool,
) -> None:
    logits = normal(rng, 33, spec.num_experts)
    bias = normal(rng, spec.num_experts) if with_bias else None
    got_ids, got_weights = cpu.gate_topk(logits, spec, bias)
    want_ids, want_weights = reference.gate_topk(logits, spec, bias)
    np.testing.assert_array_equal(got_ids, want_ids)
    np.testing.assert_allclose(got_weights, want_weights, rtol=2e-6)
    alone_ids, alone_weights = cpu.gate_topk(logits[7:8], spec, bias)
    np.testing.assert_array_equal(alone_ids[0], got_ids[7])
    np.testing.assert_array_equal(alone_weights[0], got_weights[7])


def test_gate_ties_go_to_the_lower_id(cpu: CpuOps) -> None:
    chosen, weights = cpu.gate_topk(np.zeros((1, 6), np.float32), GateSpec(6, 3, "softmax", True))
    np.testing.assert_array_equal(chosen, [[0, 1, 2]])
    assert weights[0, 0] == weights[0, 1] == weights[0, 2]


def test_gate_never_leaves_the_experts_on_nan(cpu: CpuOps) -> None:
    logits = np.full((1, 8), np.nan, np.float32)
    for spec in (SPECS[0], SPECS[3], GateSpec(8, 3, "sigmoid", True, num_groups=4, topk_groups=2)):
        chosen, _ = cpu.gate_topk(logits, spec)
        assert ((chosen >= 0) & (chosen < 8)).all()


def test_gate_with_few_experts_left_does_not_repeat_one(cpu: CpuOps) -> None:
    logits = np.array([[1.0, 2.0, 3.0, 4.0]], np.float32)
    bias = np.array([-np.inf, 0.0, -np.inf, -np.inf], np.float32)
    chosen, _ = cpu.gate_topk(logits, GateSpec(4, 3, "sigmoid", False), bias)
    np.testing.assert_array_equal(chosen, [[1, 0, 2]])


def test_impossible_gates_are_refused(cpu: CpuOps) -> None:
    logits = np.zeros((1, 8), np.float32)
    with pytest.raises(ValueError, match="eligible experts"):
        cpu.gate_topk(logits, GateSpec(8, 5, "sigmoid", True, num_groups=4, topk_groups=2))
    with pytest.raises(ValueError, match="evenly"):
        cpu.gate_topk(logits, GateSpec(8, 2, "sigmoid", True, num_groups=3, topk_groups=1))
    with pytest.raises(ValueError, match="unknown"):
        cpu.gate_topk(logits, GateSpec(8, 2, "relu", True))


def test_combine_equals_reference_bit_for_bit(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator
) -> None:
    rows, weights = normal(rng, 9, 37), normal(rng, 5, 3)
    slots = rng.integers(-1, 9, (5, 3), dtype=np.int32)
    slots[2] = -1
    got = cpu.combine_topk(rows, slots, weights)
    np.testing.assert_array_equal(got, reference.combine_topk(rows, slots, weights))
    assert not got[2].any()


def test_combine_ignores_rows_that_no_slot_names(cpu: CpuOps, rng: np.random.Generator) -> None:
    rows = normal(rng, 3, 5)
    rows[1] = np.nan
    out = cpu.combine_topk(rows, np.array([[0, -1], [2, 0]], np.int32), normal(rng, 2, 2))
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="row_of_slot"):
        cpu.combine_topk(rows, np.array([[3]], np.int32), normal(rng, 1, 1))


@pytest.mark.parametrize("repetition", [1.0, 1.3, 0.5])
def test_penalties_equal_reference_bit_for_bit(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator, repetition: float
) -> None:
    penalties = Penalties(repetition=repetition, frequency=0.17, presence=-0.4)
    for num_prompt, num_output in ((0, 0), (5, 0), (0, 7), (300, 200), (40, 3)):
        raw = normal(rng, 100)
        prompt = rng.integers(0, 100, num_prompt, dtype=np.int32)
        output = rng.integers(0, 50, num_output, dtype=np.int32)
        got, want = raw.copy(), raw.copy()
        changed, former = cpu.penalize(got, prompt, output, penalties)
        reference.penalize(want, prompt, output, penalties)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.sort(changed), np.unique(np.concatenate([prompt, output])))
        got[changed] = former
        np.testing.assert_array_equal(got, raw)


def test_penalties_of_ids_outside_the_vocabulary_are_refused(cpu: CpuOps) -> None:
    logits = np.zeros(4, np.float32)
    penalties = Penalties(repetition=2.0, frequency=0.0, presence=0.0)
    for prompt, output in ((ids(4), ids()), (ids(), ids(-1))):
        with pytest.raises(ValueError, match="must lie in"):
            cpu.penalize(logits, prompt, output, penalties)


def make_params(
    rows: int,
    uniform: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> SamplingBatch:
    return SamplingBatch(
        temperature=np.full(rows, temperature, np.float32),
        top_k=np.full(rows, top_k, np.int32),
        top_p=np.full(rows, top_p, np.float32),
        min_p=np.full(rows, min_p, np.float32),
        uniform=uniform,
    )


FILTERS: list[dict[str, float]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 30.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.999, "temperature": 5.0},
    {"min_p": 0.2},
    {"min_p": 1e-6, "temperature": 3.0},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1e-6},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [1, 5, 1000])
def test_sample_agrees_with_reference(
    cpu: CpuOps,
    reference: ReferenceOps,
    rng: np.random.Generator,
    filters: dict[str, float],
    vocab: int,
) -> None:
    logits = normal(rng, 200, vocab) * 4
    logits[::3, ::2] = -np.inf
    logits[1] = np.round(logits[1])  # ties
    logits[2:4] = 0.0
    if vocab == 1:
        logits[:] = 0.5
    params = make_params(200, rng.random(200), **filters)  # type: ignore[arg-type]
    got = cpu.sample(logits, params)
    np.testing.assert_array_equal(got, reference.sample(logits, params))
    np.testing.assert_array_equal(
        cpu.sample(
            logits[:1],
            make_params(
                1,
                params.uniform[:1],
                **filters,  # type: ignore[arg-type]
            ),
        ),
        got[:1],
    )


def test_sample_follows_the_distribution(cpu: CpuOps) -> None:
    weights = np.array([0.5, 0.1, 0.4])
    logits = np.tile(np.log(weights).astype(np.float32), (1000, 1))
    uniform = (np.arange(1000) + 0.5) / 1000
    got = cpu.sample(logits, make_params(1000, uniform))
    np.testing.assert_array_equal(np.bincount(got), [500, 100, 400])
    np.testing.assert_array_equal(got, np.repeat([0, 2, 1], [500, 400, 100]))


def test_banned_tokens_are_never_sampled(cpu: CpuOps) -> None:
    logits = np.full((64, 50), -np.inf, np.float32)
    logits[:, 17] = -3.0
    logits[:, 18] = -4.0
    uniform = np.linspace(0, 1, 64, endpoint=False)
    uniform[-1] = np.nextafter(1.0, 0.0)
    got = cpu.sample(logits, make_params(64, uniform, temperature=2.0))
    assert set(got.tolist()) == {17, 18}


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_broken_logits_still_give_a_token_of_the_vocabulary(
    cpu: CpuOps, rng: np.random.Generator, filters: dict[str, float]
) -> None:
    logits = normal(rng, 6, 40)
    logits[0] = np.nan
    logits[1, ::2] = np.nan
    logits[2] = -np.inf
    logits[3, 5] = np.inf
    logits[4, 0] = np.nan
    params = make_params(6, rng.random(6), **filters)  # type: ignore[arg-type]
    got = cpu.sample(logits, params)
    assert ((got >= 0) & (got < 40)).all()
    assert got[3] == 5


def test_greedy_takes_the_lowest_id_of_a_tie(cpu: CpuOps) -> None:
    logits = np.zeros((2, 100), np.float32)
    logits[0, [40, 41, 99]] = 1.0
    params = make_params(2, np.array([0.9, 0.9]), temperature=0.0)
    np.testing.assert_array_equal(cpu.sample(logits, params), [40, 0])


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_top_logprobs_agree_with_reference(
    cpu: CpuOps, reference: ReferenceOps, rng: np.random.Generator, num_top: int
) -> None:
    logits = normal(rng, 9, 321) * 5
    logits[2] = np.round(logits[2])
    logits[3, 7] = -np.inf
    tokens = rng.integers(0, 321, 9, dtype=np.int32)
    tokens[3] = 7
    got, want = (ops.top_logprobs(logits, tokens, num_top) for ops in (cpu, reference))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[1], want[1])
    np.testing.assert_allclose(got[2], want[2], rtol=1e-5, atol=1e-6)
    assert got[0][3] == -np.inf
    alone = cpu.top_logprobs(logits[4:5], tokens[4:5], num_top)
    for part, whole in zip(alone, got, strict=True):
        np.testing.assert_array_equal(part[0], whole[4])


def test_top_logprobs_bounds(cpu: CpuOps) -> None:
    logits = np.zeros((1, 4), np.float32)
    with pytest.raises(ValueError, match="num_top"):
        cpu.top_logprobs(logits, ids(0), 5)
    with pytest.raises(ValueError, match="token_ids"):
        cpu.top_logprobs(logits, ids(4), 1)
