"""The cases of dense operators and of those that choose the next token.

A function per operator of `Ops`, by its name; it yields the cases of one model.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Final

import numpy as np
from benchmarks.operators import torch_cases
from benchmarks.operators.case import Calls, Case, Prepared, Sizes
from benchmarks.operators.operands import NUM_CHOICES, Operands, WeightPart
from benchmarks.operators.roofline import Work
from benchmarks.operators.weights import (
    first_linear,
    grouped_weights,
    linear_weights,
    mlp_sites,
)

from xdeepserve.models.spec import ModelSpec
from xdeepserve.ops import PackedWeight, Penalties, SamplingBatch, WeightDtype

NUM_TOP: Final = 5
TOP_K: Final = 50
TOP_P: Final = 0.95
TEMPERATURE: Final = 0.8


# -- weights ------------------------------------------------------------------------------------


def pack(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """One weight; its float32 values and its bytes are both counted."""
    name, shape = first_linear(model)

    def prepare(dtype: WeightDtype, operands: Operands) -> Prepared:
        values = operands.values(*shape)
        packed = operands.ops.pack(values, dtype=dtype)
        work = Work(cache_bytes=values.nbytes + packed.data.nbytes)
        return Prepared([partial(operands.ops.pack, values, dtype=dtype)], work)

    for dtype in sizes.dtypes:
        yield Case("pack", name, None, None, str(dtype), partial(prepare, dtype))


def unpack(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """One weight, as `pack`."""
    name, shape = first_linear(model)

    def prepare(dtype: WeightDtype, operands: Operands) -> Prepared:
        packed = operands.ops.pack(operands.values(*shape), dtype=dtype)
        work = Work(cache_bytes=4 * prod(shape) + packed.data.nbytes)
        return Prepared([partial(operands.ops.unpack, packed)], work)

    for dtype in sizes.dtypes:
        yield Case("unpack", name, None, None, str(dtype), partial(prepare, dtype))


# -- dense --------------------------------------------------------------------------------------


def embed(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Rows of a bfloat16 table at other ids in each call."""
    vocab, width = model.vocab_size, model.hidden_size

    def prepare(tokens: int, operands: Operands) -> Prepared:
        table = operands.bits(vocab, width)
        ids = [operands.ids(tokens, vocab) for _ in range(NUM_CHOICES)]
        calls: Calls = [partial(operands.ops.embed, table, some) for some in ids]
        return Prepared(calls, Work(cache_bytes=6 * tokens * width))

    for tokens in sizes.tokens:
        peer = partial(torch_cases.embed, vocab, width, tokens)
        yield Case("embed", "", tokens, None, "bf16", partial(prepare, tokens), peer)


def linear(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Every plain projection; the router in float32, as it is served."""
    for name, shape in linear_weights(model):
        dtypes = (WeightDtype.FLOAT32,) if name == "router" else sizes.dtypes
        for part in (WeightPart(shape, dtype) for dtype in dtypes):
            for tokens in sizes.tokens:
                prepare = partial(_prepare_linear, part, tokens)
                peer = partial(torch_cases.linear, part, tokens)
                yield Case("linear", name, tokens, None, str(part.dtype), prepare, peer)


def _prepare_linear(part: WeightPart, tokens: int, operands: Operands) -> Prepared:
    x = operands.values(tokens, part.shape[2])
    sets = operands.weights(part)
    calls: Calls = [partial(operands.ops.linear, x, weight) for (weight,) in sets]
    return Prepared(calls, _product_work(sets[0], tokens))


def _product_work(weights: tuple[PackedWeight, ...], tokens: int) -> Work:
    """Each group of each weight multiplies `tokens` rows of its own."""
    values = [prod(weight.shape) for weight in weights]
    ends = weights[0].shape[0] * (weights[0].shape[2] + weights[-1].shape[1])
    return Work(
        memory_bytes=sum(weight.data.nbytes for weight in weights),
        cache_bytes=4 * tokens * ends,
        operations=2 * tokens * sum(values),
        dtype=weights[0].dtype,
    )


def grouped_linear(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """MLA's matrices of each head."""

    def prepare(part: WeightPart, tokens: int, operands: Operands) -> Prepared:
        groups, _, inner = part.shape
        x = operands.values(tokens, groups, inner)
        sets = operands.weights(part)
        calls: Calls = [partial(operands.ops.grouped_linear, x, weight) for (weight,) in sets]
        return Prepared(calls, _product_work(sets[0], tokens))

    for name, shape in grouped_weights(model):
        for part in (WeightPart(shape, dtype) for dtype in sizes.dtypes):
            for tokens in sizes.tokens:
                yield Case(
                    "grouped_linear", name, tokens, None, str(part.dtype),
                    partial(prepare, part, tokens),
                    partial(torch_cases.grouped_linear, part, tokens),
                )  # fmt: skip


def rms_norm(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """The norm of a whole row."""

    def prepare(tokens: int, operands: Operands) -> Prepared:
        x, weight = operands.values(tokens, model.hidden_size), operands.values(model.hidden_size)
        call = partial(operands.ops.rms_norm, x, weight, model.norm_eps)
        return Prepared([call], Work(cache_bytes=2 * x.nbytes))

    for tokens in sizes.tokens:
        peer = partial(torch_cases.rms_norm, model.hidden_size, tokens)
        yield Case("rms_norm", "", tokens, None, "", partial(prepare, tokens), peer)


def add_rms_norm(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Two rows in, two rows out."""

    def prepare(tokens: int, operands: Operands) -> Prepared:
        x, weight = operands.values(tokens, model.hidden_size), operands.values(model.hidden_size)
        call = partial(operands.ops.add_rms_norm, x.copy(), x, weight, model.norm_eps)
        return Prepared([call], Work(cache_bytes=4 * x.nbytes))

    for tokens in sizes.tokens:
        peer = partial(torch_cases.add_rms_norm, model.hidden_size, tokens)
        yield Case("add_rms_norm", "", tokens, None, "", partial(prepare, tokens), peer)


def swiglu_mlp(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """The FFN of dense layers, and all shared experts as one."""

    def prepare(parts: list[WeightPart], tokens: int, operands: Operands) -> Prepared:
        x = operands.values(tokens, model.hidden_size)
        sets = operands.weights(*parts)
        calls: Calls = [partial(operands.ops.swiglu_mlp, x, up, down) for up, down in sets]
        return Prepared(calls, _product_work(sets[0], tokens))

    for name, shapes in mlp_sites(model):
        for dtype in sizes.dtypes:
            parts = [WeightPart(shape, dtype) for shape in shapes]
            for tokens in sizes.tokens:
                yield Case(
                    "swiglu_mlp", name, tokens, None, str(dtype),
                    partial(prepare, parts, tokens),
                    partial(torch_cases.swiglu_mlp, parts, tokens),
                )  # fmt: skip


def quantize_rows(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """A step's hidden states."""

    def prepare(tokens: int, operands: Operands) -> Prepared:
        x = operands.values(tokens, model.hidden_size)
        call = partial(operands.ops.quantize_rows, x)
        return Prepared([call], Work(cache_bytes=x.nbytes + x.size))

    for tokens in sizes.tokens:
        peer = partial(torch_cases.quantize_rows, model.hidden_size, tokens)
        yield Case("quantize_rows", "", tokens, None, "", partial(prepare, tokens), peer)


# -- next token ---------------------------------------------------------------------------------


def lm_head(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Greedy rows only; of a prefilled sequence one row samples, so there are no more rows."""
    shape = (1, model.vocab_size, model.hidden_size)

    def prepare(part: WeightPart, tokens: int, operands: Operands) -> Prepared:
        x = operands.values(tokens, model.hidden_size)
        sets = operands.weights(part)
        calls: Calls = [partial(operands.ops.lm_head, x, weight, tokens) for (weight,) in sets]
        work = _product_work(sets[0], tokens)
        return Prepared(calls, Work(work.memory_bytes, x.nbytes, work.operations, work.dtype))

    for part in (WeightPart(shape, dtype) for dtype in sizes.dtypes):
        for tokens in sizes.decode:
            yield Case(
                "lm_head", "greedy", tokens, None, str(part.dtype),
                partial(prepare, part, tokens),
                partial(torch_cases.lm_head, part, tokens),
            )  # fmt: skip


def penalize(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """One row; half of its context is prompt. Every other call undoes what the one before did."""

    def prepare(context: int, operands: Operands) -> Prepared:
        logits = operands.values(model.vocab_size)
        prompt, output = operands.ids(context, model.vocab_size).reshape(2, -1)
        both = (Penalties(1.1, 0.1, 0.1), Penalties(1 / 1.1, -0.1, -0.1))
        calls: Calls = [partial(operands.ops.penalize, logits, prompt, output, p) for p in both]
        return Prepared(calls, Work(cache_bytes=20 * context))

    for context in sizes.contexts:
        yield Case("penalize", "", 1, context, "", partial(prepare, context))


def sample(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """Rows with every filter on."""

    def prepare(rows: int, operands: Operands) -> Prepared:
        logits = operands.values(rows, model.vocab_size)
        params = SamplingBatch(
            temperature=np.full(rows, TEMPERATURE, np.float32),
            top_k=np.full(rows, TOP_K, np.int32),
            top_p=np.full(rows, TOP_P, np.float32),
            min_p=np.full(rows, 0.01, np.float32),
            uniform=operands.rng.random(rows),
        )
        call = partial(operands.ops.sample, logits, params)
        return Prepared([call], Work(cache_bytes=logits.nbytes))

    for rows in sizes.decode:
        peer = partial(torch_cases.sample, model.vocab_size, rows)
        yield Case("sample", "top-k, top-p", rows, None, "", partial(prepare, rows), peer)


def top_logprobs(model: ModelSpec, sizes: Sizes) -> Iterator[Case]:
    """The chosen token's and the best ones'."""

    def prepare(rows: int, operands: Operands) -> Prepared:
        logits = operands.values(rows, model.vocab_size)
        ids = operands.ids(rows, model.vocab_size)
        call = partial(operands.ops.top_logprobs, logits, ids, NUM_TOP)
        return Prepared([call], Work(cache_bytes=logits.nbytes))

    for rows in sizes.decode:
        peer = partial(torch_cases.top_logprobs, model.vocab_size, rows)
        yield Case("top_logprobs", f"top {NUM_TOP}", rows, None, "", partial(prepare, rows), peer)
