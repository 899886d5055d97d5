"""torch's side of every case but attention's: the operator itself, or, for a fused one, the torch
operators that an engine written in torch would call. A dict of ways; the fastest counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from benchmarks.operators.operands import WeightPart, expert_choices
from benchmarks.operators.torch_operands import Product, ProductSet, Tensor, TorchOperands

from xdeepserve.ops import GateSpec, WeightDtype

Calls = list[Callable[[], object]]
Ways = dict[str, Calls]
ExpertPeer = Callable[[GateSpec, list[WeightPart], int, TorchOperands], Ways]


def _ways(
    operands: TorchOperands, parts: list[WeightPart], bind: Callable[[ProductSet], Calls]
) -> Ways:
    """What `bind` makes of each copy of the products, for each way."""
    found = operands.products(*parts)
    return {way: [call for set_ in sets for call in bind(set_)] for way, sets in found.items()}


# -- dense --------------------------------------------------------------------------------------


def embed(vocab: int, width: int, tokens: int, operands: TorchOperands) -> Ways:
    """Rows of a bfloat16 table."""
    torch = operands.torch
    table = operands.values(vocab, width).bfloat16()
    ids = [torch.randint(0, vocab, (tokens,)) for _ in range(8)]
    return {"embedding": [partial(torch.nn.functional.embedding, some, table) for some in ids]}


def linear(part: WeightPart, tokens: int, operands: TorchOperands) -> Ways:
    """One product."""
    x = operands.rows(part.dtype, tokens, part.shape[2])
    return _ways(operands, [part], lambda set_: [partial(set_[0][0], x)])


def lm_head(part: WeightPart, tokens: int, operands: TorchOperands) -> Ways:
    """A product, and the largest of each row."""
    x = operands.rows(part.dtype, tokens, part.shape[2])

    def greedy(product: Product) -> Tensor:
        return product(x).argmax(1)

    return _ways(operands, [part], lambda set_: [partial(greedy, set_[0][0])])


def grouped_linear(part: WeightPart, tokens: int, operands: TorchOperands) -> Ways:
    """A batched product; torch has one in bf16."""
    if part.dtype is not WeightDtype.BF16:
        return {}
    groups, _, inner = part.shape
    x = operands.values(tokens, groups, inner).bfloat16().transpose(0, 1)
    weights = operands.copies(operands.values(*part.shape).bfloat16())
    return {"bmm": [partial(operands.torch.bmm, x, weight.mT) for weight in weights]}


def rms_norm(width: int, tokens: int, operands: TorchOperands) -> Ways:
    """float32, as ours."""
    x, weight = operands.values(tokens, width), operands.values(width)
    norm = operands.torch.nn.functional.rms_norm
    return {"rms_norm": [partial(norm, x, (width,), weight, 1e-6)]}


def add_rms_norm(width: int, tokens: int, operands: TorchOperands) -> Ways:
    """A sum and its norm."""
    x, weight = operands.values(tokens, width), operands.values(width)
    norm = operands.torch.nn.functional.rms_norm

    def call() -> tuple[Tensor, Tensor]:
        total = x + x
        return total, norm(total, (width,), weight, 1e-6)

    return {"add, rms_norm": [call]}


def swiglu_mlp(parts: list[WeightPart], tokens: int, operands: TorchOperands) -> Ways:
    """Two products around silu."""
    dtype = parts[0].dtype
    x = operands.rows(dtype, tokens, parts[0].shape[2])

    def bind(products: ProductSet) -> Calls:
        return [partial(_mlp, operands, products[0][0], products[1][0], x)]

    return _ways(operands, parts, bind)


def _mlp(operands: TorchOperands, gate_up: Product, down: Product, x: Tensor) -> Tensor:
    gate, up = gate_up(x).chunk(2, dim=-1)
    return down(operands.torch.nn.functional.silu(gate) * up)


def quantize_rows(width: int, tokens: int, operands: TorchOperands) -> Ways:
    """A scale per row."""
    torch = operands.torch
    x = operands.values(tokens, width)

    def call() -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(1, keepdim=True) / 127
        return (x / scale).round().to(torch.int8), scale

    return {"amax, round": [call]}


# -- experts ------------------------------------------------------------------------------------


def gate_topk(gate: GateSpec, tokens: int, operands: TorchOperands) -> Ways:
    """The gate as transformers writes it."""
    logits, bias = operands.values(tokens, gate.num_experts), operands.values(gate.num_experts)

    def call() -> tuple[Tensor, Tensor]:
        if gate.scoring == "softmax":
            weights, ids = logits.softmax(1).topk(gate.top_k)
        else:
            scores = logits.sigmoid()
            ids = _in_best_groups(gate, scores + bias, operands).topk(gate.top_k).indices
            weights = scores.gather(1, ids)
        if gate.renormalize:
            weights = weights / weights.sum(1, keepdim=True)
        return ids.to(operands.torch.int32), weights * gate.scaling

    return {f"{gate.scoring}, topk": [call]}


def _in_best_groups(gate: GateSpec, scores: Tensor, operands: TorchOperands) -> Tensor:
    if gate.num_groups == 1:
        return scores
    groups = scores.view(len(scores), gate.num_groups, -1)
    best = groups.topk(2).values.sum(2).topk(gate.topk_groups).indices
    is_out = operands.torch.ones(groups.shape[:2], dtype=operands.torch.bool)
    is_out.scatter_(1, best, value=False)
    return groups.masked_fill(is_out[:, :, None], float("-inf")).view_as(scores)


def expert_mlp(
    gate: GateSpec, parts: list[WeightPart], tokens: int, operands: TorchOperands
) -> Ways:
    """The experts that have rows, one after the other."""
    torch = operands.torch
    x = operands.rows(parts[0].dtype, tokens * gate.top_k, parts[0].shape[2])
    choices = expert_choices(gate, tokens)
    counts = [np.bincount(ids.ravel(), minlength=gate.num_experts).tolist() for ids in choices]

    def call(products: ProductSet, rows_of: list[int]) -> Tensor:
        rows = x.split(rows_of)
        active = [e for e, count in enumerate(rows_of) if count]
        return torch.cat([_mlp(operands, products[0][e], products[1][e], rows[e]) for e in active])

    found = operands.products(*parts)
    return {
        way: [partial(call, products, rows_of) for rows_of in counts for products in sets]
        for way, sets in found.items()
    }


def routed_experts(
    gate: GateSpec, parts: list[WeightPart], tokens: int, operands: TorchOperands
) -> Ways:
    """For each expert that a token chose: pick rows, compute, add."""
    torch = operands.torch
    x = operands.rows(parts[0].dtype, tokens, parts[0].shape[2])
    share = torch.tensor(1 / gate.top_k, dtype=x.dtype)

    def call(products: ProductSet, ids: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, _ = torch.where(ids == expert)
            computed = _mlp(operands, products[0][expert], products[1][expert], x[rows])
            out.index_add_(0, rows, computed * share)
        return out

    choices = [torch.from_numpy(ids) for ids in expert_choices(gate, tokens)]
    found = operands.products(*parts)
    return {
        way: [partial(call, products, ids) for ids in choices for products in sets]
        for way, sets in found.items()
    }


def combine_topk(top_k: int, width: int, tokens: int, operands: TorchOperands) -> Ways:
    """Pick rows, then a batched product with their weights."""
    torch = operands.torch
    rows = operands.values(tokens * top_k, width)
    order = torch.randperm(tokens * top_k)
    weights = torch.full((tokens, 1, top_k), 1 / top_k)

    def call() -> Tensor:
        return torch.bmm(weights, rows[order].view(tokens, top_k, width))[:, 0]

    return {"index, bmm": [call]}


# -- next token ---------------------------------------------------------------------------------


def sample(vocab: int, rows: int, operands: TorchOperands) -> Ways:
    """Temperature, the 50 best, the nucleus of those, one of them."""
    torch = operands.torch
    logits = operands.values(rows, vocab)

    def call() -> Tensor:
        best, ids = (logits / 0.8).topk(50)
        probabilities = best.softmax(1)
        outside = probabilities.cumsum(1) - probabilities > 0.95
        chosen = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1)
        return ids.gather(1, chosen)

    return {"topk, softmax, multinomial": [call]}


def top_logprobs(vocab: int, rows: int, operands: TorchOperands) -> Ways:
    """Log softmax, and the best of it."""
    torch = operands.torch
    logits, ids = operands.values(rows, vocab), torch.randint(0, vocab, (rows, 1))

    def call() -> tuple[Tensor, Tensor]:
        values = logits.log_softmax(1)
        return values.gather(1, ids), values.topk(5)

    return {"log_softmax, topk": [call]}
