"""Which function yields the cases of which operator, and why torch has none of some."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from benchmarks.operators import attention_cases, cases, expert_cases, layer_cases
from benchmarks.operators.case import Case, Sizes

from xdeepserve.models.spec import ModelSpec

CASES: Final[dict[str, Callable[[ModelSpec, Sizes], Iterator[Case]]]] = {
    "pack": cases.pack,
    "unpack": cases.unpack,
    "embed": cases.embed,
    "linear": cases.linear,
    "grouped_linear": cases.grouped_linear,
    "rms_norm": cases.rms_norm,
    "add_rms_norm": cases.add_rms_norm,
    "swiglu_mlp": cases.swiglu_mlp,
    "quantize_rows": cases.quantize_rows,
    "rope_kv_write": attention_cases.rope_kv_write,
    "paged_attention": attention_cases.paged_attention,
    "rope": attention_cases.rope,
    "mla_kv_write": attention_cases.mla_kv_write,
    "mla_attention": attention_cases.mla_attention,
    "gqa_layer": layer_cases.gqa_layer,
    "mla_layer": layer_cases.mla_layer,
    "gate_topk": expert_cases.gate_topk,
    "expert_mlp": expert_cases.expert_mlp,
    "combine_topk": expert_cases.combine_topk,
    "routed_experts": expert_cases.routed_experts,
    "decoder_layers": layer_cases.decoder_layers,
    "lm_head": cases.lm_head,
    "penalize": cases.penalize,
    "sample": cases.sample,
    "top_logprobs": cases.top_logprobs,
}

WITHOUT_TORCH: Final = {
    "pack": "the layout is our own",
    "unpack": "the layout is our own",
    "grouped_linear": "torch's batched product has float and bf16 weights only",
    "rope_kv_write": "torch has no paged cache",
    "paged_attention": "torch's attention has no int8 cache",
    "mla_kv_write": "torch has no paged cache",
    **dict.fromkeys(
        ("gqa_layer", "mla_layer", "decoder_layers"),
        "no single operator; its parts are beside torch one by one",
    ),
    "penalize": "torch has no such operator",
}
"""Why the torch column of an operator is empty, in all its cases or in some."""


def cases_of(model: ModelSpec, sizes: Sizes, operators: Sequence[str]) -> Iterator[Case]:
    """The cases of `operators` that a model has."""
    for operator in operators:
        yield from CASES[operator](model, sizes)
