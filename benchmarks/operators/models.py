"""The shapes of the four compared models, and tiny ones of the same families.

Only config.json counts here: no weights are read or downloaded.
"""

from __future__ import annotations

from typing import Any, Final

from benchmarks.peers.models import DENSE, UPCYCLED, random_checkpoint

from xdeepserve.models.families import parse_spec
from xdeepserve.models.spec import ModelSpec
from xdeepserve.testing.toy_models import toy_checkpoint

_SMOLLM2: Final[dict[str, Any]] = {
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_CATALOG_CONFIGS: Final[dict[str, dict[str, Any]]] = {
    DENSE: _SMOLLM2 | {"model_type": "llama"},
    UPCYCLED: _SMOLLM2
    | {
        "model_type": "glm4_moe",
        "use_qk_norm": False,
        "partial_rotary_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 768,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    },
}

_TOYS: Final = {
    DENSE: "llama",
    UPCYCLED: "glm4_moe",
    "qwen3-moe-random": "qwen3_moe",
    "deepseek-v3-random": "deepseek_v3",
}


def spec_of(model: str) -> ModelSpec:
    """The architecture of a model of `peers.models.MODELS`."""
    config = _CATALOG_CONFIGS.get(model)
    return parse_spec(random_checkpoint(model).config if config is None else config)


def toy_spec_of(model: str) -> ModelSpec:
    """A tiny architecture of the family of `model`."""
    return parse_spec(toy_checkpoint(_TOYS[model]).config)
