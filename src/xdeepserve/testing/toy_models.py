"""Toy checkpoints: tiny models of every family with weights made from their names.

Values come from integer arithmetic alone, so they are the same on every machine and with every
NumPy; golden vectors can be stored without the weights. A toy is a `Checkpoint` and can be written
to a Hugging Face folder by whoever has a writer.
"""

# size: one config and one table of shapes per family; split, they would be read together anyway

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from xdeepserve.errors import ModelFormatError
from xdeepserve.ops.types import F32

Config = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]


class ToyCheckpoint:
    """A `Checkpoint` whose tensors are made on demand.

    Attributes:
        config: config.json of the model.
        shapes: shape of every tensor by Hugging Face name.
    """

    def __init__(self, config: Config, shapes: Shapes, *, seed: int = 0) -> None:
        self.config = config
        self.shapes = shapes
        self._seed = seed

    def names(self) -> frozenset[str]:
        """Hugging Face tensor names."""
        return frozenset(self.shapes)

    def tensor(self, name: str) -> F32:
        """The float32 tensor `name`: norms near 1, biases near 0, matrices of unit gain.

        Raises:
            ModelFormatError: there is no such tensor.
        """
        if name not in self.shapes:
            raise ModelFormatError(f"tensor {name!r} is missing")
        shape = self.shapes[name]
        noise = pseudo_random(f"{self._seed}:{name}", shape)
        if name.endswith("norm.weight"):
            return np.float32(1.0) + np.float32(0.2) * noise
        if len(shape) == 1:
            return np.float32(0.2) * noise
        if name == "model.embed_tokens.weight":
            # small, or a model with tied embeddings would only repeat its last token
            return np.float32(0.1) * noise
        return noise * np.float32((3.0 / shape[-1]) ** 0.5)

    def tensors(self) -> dict[str, F32]:
        """All tensors by name."""
        return {name: self.tensor(name) for name in self.shapes}


def pseudo_random(key: str, shape: tuple[int, ...]) -> F32:
    """float32 values in [-1, 1), a pure function of `key` (splitmix64 of a running counter)."""
    count = int(np.prod(shape))
    start = np.uint64(zlib.crc32(key.encode()) << 32)
    x = (start + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    values = (x >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return values.reshape(shape)


def toy_checkpoint(name: str, *, seed: int = 0, **changes: Any) -> ToyCheckpoint:
    """The toy called `name` (see TOY_MODELS), with changes to its config.json."""
    config = _TOYS[name]() | changes
    return ToyCheckpoint(config, _shapes(config), seed=seed)


def _base(model_type: str, **fields: Any) -> Config:
    return {
        "model_type": model_type,
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        **fields,
    }


def _llama() -> Config:
    return _base("llama", tie_word_embeddings=True, rope_theta=10000.0, rope_scaling=None)


def _llama3() -> Config:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return _base("llama", rope_parameters=rope, attention_bias=True, head_dim=32)


def _llama_linear() -> Config:
    return _base("llama", rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0})


def _qwen2() -> Config:
    return _base("qwen2", rope_theta=1e6, use_sliding_window=False, sliding_window=128)


def _qwen3() -> Config:
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    return _base("qwen3", head_dim=16, rope_parameters=rope, tie_word_embeddings=True)


def _qwen3_moe() -> Config:
    return _base(
        "qwen3_moe",
        num_hidden_layers=4,
        head_dim=32,
        rope_theta=10000.0,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
    )


def _mixtral() -> Config:
    return _base(
        "mixtral",
        rope_theta=1e6,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=None,
    )


def _deepseek_v3() -> Config:
    rope = {
        "type": "yarn",
        "factor": 8.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "original_max_position_embeddings": 64,
    }
    return _mla("deepseek_v3", rope_theta=10000, rope_scaling=rope)


def _deepseek_v3_mtp() -> Config:
    return _deepseek_v3() | {"num_nextn_predict_layers": 1}


def _glm4_moe_mtp() -> Config:
    return _glm4_moe() | {"num_nextn_predict_layers": 1}


def _deepseek_v3_plain() -> Config:
    return _mla(
        "deepseek_v3",
        q_lora_rank=None,
        attention_bias=True,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _mla(model_type: str, **fields: Any) -> Config:
    mla = {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "q_lora_rank": 40,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    return _base(model_type, **(mla | fields))


def _glm4_moe() -> Config:
    return _glm(use_qk_norm=True, attention_bias=True, partial_rotary_factor=0.5)


def _glm4_moe_plain() -> Config:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    return _glm(rope_parameters=rope, n_shared_experts=2, routed_scaling_factor=1.0)


def _glm(**fields: Any) -> Config:
    moe = {
        "num_hidden_layers": 3,
        "head_dim": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
    }
    return _base("glm4_moe", **(moe | fields))


_TOYS: dict[str, Callable[[], Config]] = {
    "llama": _llama,
    "llama3": _llama3,
    "llama_linear": _llama_linear,
    "qwen2": _qwen2,
    "qwen3_yarn": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v3_plain": _deepseek_v3_plain,
    "glm4_moe": _glm4_moe,
    "glm4_moe_plain": _glm4_moe_plain,
}

TOY_MODELS: tuple[str, ...] = tuple(_TOYS)
"""Names for `toy_checkpoint`: every family, and the variants that take another code path."""

MTP_TOYS: tuple[str, ...] = ("deepseek_v3_mtp", "glm4_moe_mtp")
"""Toys with a layer for multi-token prediction, else equal to those without."""

_TOYS |= {"deepseek_v3_mtp": _deepseek_v3_mtp, "glm4_moe_mtp": _glm4_moe_mtp}


def _shapes(config: Config) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    num_mtp = config.get("num_nextn_predict_layers", 0)
    for idx in range(config["num_hidden_layers"] + num_mtp):
        prefix = f"model.layers.{idx}"
        if idx >= config["num_hidden_layers"]:
            shapes |= {f"{prefix}.{k}": v for k, v in _mtp_shapes(config).items()}
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        attention = _mla_shapes if "kv_lora_rank" in config else _gqa_shapes
        shapes |= {f"{prefix}.self_attn.{k}": v for k, v in attention(config).items()}
        shapes |= {f"{prefix}.{k}": v for k, v in _ffn_shapes(config, idx).items()}
    return shapes


def _gqa_shapes(config: Config) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    dim = config.get("head_dim") or hidden // heads
    q, kv = heads * dim, config["num_key_value_heads"] * dim
    shapes: Shapes = {f"{n}_proj.weight": (size, hidden) for n, size in _qkv(q, kv)}
    shapes["o_proj.weight"] = (hidden, q)
    family = config["model_type"]
    if family == "qwen2" or config.get("attention_bias"):
        shapes |= {f"{n}_proj.bias": (size,) for n, size in _qkv(q, kv)}
    if family == "llama" and config.get("attention_bias"):
        shapes["o_proj.bias"] = (hidden,)
    if family.startswith("qwen3") or config.get("use_qk_norm"):
        shapes |= {"q_norm.weight": (dim,), "k_norm.weight": (dim,)}
    return shapes


def _qkv(q: int, kv: int) -> list[tuple[str, int]]:
    return [("q", q), ("k", kv), ("v", kv)]


def _mla_shapes(config: Config) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rotary, value = (
        config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    q_out = heads * (nope + rotary)
    shapes: Shapes = {
        "kv_a_proj_with_mqa.weight": (rank + rotary, hidden),
        "kv_a_layernorm.weight": (rank,),
        "kv_b_proj.weight": (heads * (nope + value), rank),
        "o_proj.weight": (hidden, heads * value),
    }
    if q_rank is None:
        shapes["q_proj.weight"] = (q_out, hidden)
    else:
        shapes["q_a_proj.weight"] = (q_rank, hidden)
        shapes["q_a_layernorm.weight"] = (q_rank,)
        shapes["q_b_proj.weight"] = (q_out, q_rank)
    if config.get("attention_bias"):
        shapes |= {"kv_a_proj_with_mqa.bias": (rank + rotary,), "o_proj.bias": (hidden,)}
        if q_rank is not None:
            shapes["q_a_proj.bias"] = (q_rank,)
    return shapes


def _mtp_shapes(config: Config) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    return {
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "embed_tokens.weight": (vocab, hidden),
        "shared_head.norm.weight": (hidden,),
        "shared_head.head.weight": (vocab, hidden),
    }


def _ffn_shapes(config: Config, idx: int) -> Shapes:
    hidden = config["hidden_size"]
    if not _is_moe(config, idx):
        return _mlp("mlp", hidden, config["intermediate_size"])
    if config["model_type"] == "mixtral":
        return _mixtral_shapes(config)
    num_experts = config.get("n_routed_experts") or config["num_experts"]
    size = config["moe_intermediate_size"]
    shapes: Shapes = {"mlp.gate.weight": (num_experts, hidden)}
    for expert in range(num_experts):
        shapes |= _mlp(f"mlp.experts.{expert}", hidden, size)
    if "n_routed_experts" in config:
        shapes["mlp.gate.e_score_correction_bias"] = (num_experts,)
        shapes |= _mlp("mlp.shared_experts", hidden, size * config["n_shared_experts"])
    return shapes


def _is_moe(config: Config, idx: int) -> bool:
    if config["model_type"] == "qwen3_moe":
        step = config["decoder_sparse_step"]
        return idx not in config["mlp_only_layers"] and (idx + 1) % step == 0
    if config["model_type"] == "mixtral":
        return True
    return "n_routed_experts" in config and idx >= config["first_k_dense_replace"]


def _mixtral_shapes(config: Config) -> Shapes:
    hidden, size = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {"block_sparse_moe.gate.weight": (config["num_local_experts"], hidden)}
    for expert in range(config["num_local_experts"]):
        prefix = f"block_sparse_moe.experts.{expert}"
        shapes |= {f"{prefix}.w1.weight": (size, hidden), f"{prefix}.w3.weight": (size, hidden)}
        shapes[f"{prefix}.w2.weight"] = (hidden, size)
    return shapes


def _mlp(prefix: str, hidden: int, size: int) -> Shapes:
    return {
        f"{prefix}.gate_proj.weight": (size, hidden),
        f"{prefix}.up_proj.weight": (size, hidden),
        f"{prefix}.down_proj.weight": (hidden, size),
    }
