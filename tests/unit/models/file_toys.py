"""Tiny model files for tests: raw safetensors bytes, a llama folder, a llama GGUF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from xdeepserve.models.files.checkpoint_writer import write_hf_folder
from xdeepserve.models.files.safetensors_file import TensorPlan
from xdeepserve.ops import F32

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def raw_safetensors(
    path: Path, header: Any, data: bytes = b"", *, length: int | None = None
) -> Path:
    """Write a file with any header: a value to encode, or bytes as they are."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(encoded) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + encoded + data)
    return path


def llama_tensors(config: dict[str, Any] = LLAMA_CONFIG, seed: int = 0) -> dict[str, F32]:
    """Random tensors of a tied llama model, values exact in bfloat16."""
    rng = np.random.default_rng(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (q, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, q),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    return {
        name: (rng.integers(-128, 128, shape) / 128).astype(np.float32)
        for name, shape in shapes.items()
    }


def llama_folder(
    path: Path, config: dict[str, Any] = LLAMA_CONFIG, tensors: dict[str, F32] | None = None
) -> Path:
    """A Hugging Face folder of the toy llama (bf16)."""
    values = llama_tensors(config) if tensors is None else tensors
    plans = [TensorPlan(n, v.shape, lambda v=v: v) for n, v in values.items()]
    write_hf_folder(path, config=config, tensors=plans, files={"tokenizer.json": b"{}"})
    return path


GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def permute_as_gguf(weight: F32, heads: int) -> F32:
    """The row order GGUF uses for q and k: (half, i) of a head becomes (i, half)."""
    rows, dim = weight.shape[0], weight.shape[0] // heads
    order = [
        head * dim + half * dim // 2 + i
        for head in range(heads)
        for i in range(dim // 2)
        for half in range(2)
    ]
    assert sorted(order) == list(range(rows))
    return weight[order]


def llama_gguf(
    path: Path,
    *,
    tensors: dict[str, F32] | None = None,
    metadata: dict[str, Any] | None = None,
    extra: dict[str, F32] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> Path:
    """A float32 GGUF file of the toy llama; `metadata` overrides or (None) drops llama.* keys."""
    values = llama_tensors() if tensors is None else tensors
    writer = GGUFWriter(path, "llama")
    fields: dict[str, Any] = {
        "block_count": 3,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.dimension_count": 8,
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **(metadata or {}),
    }
    for name, value in fields.items():
        _add(writer, f"llama.{name}", value)
    for name, value in (tokenizer or {}).items():
        _add(writer, name, value)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_tensor("token_embd.weight", values["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", values["model.norm.weight"])
    for layer in range(3):
        for short, long in GGUF_LAYER_NAMES.items():
            value = values[f"model.layers.{layer}.{long}.weight"]
            if short in ("attn_q", "attn_k"):
                value = permute_as_gguf(value, 4 if short == "attn_q" else 2)
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(value))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    _write(writer)
    return path


def quantized_gguf(path: Path, values: F32, kind: GGMLQuantizationType) -> Path:
    """A GGUF file with the one tensor "t" stored as `kind`."""
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("t", quantize(values, kind), raw_dtype=kind)
    _write(writer)
    return path


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
