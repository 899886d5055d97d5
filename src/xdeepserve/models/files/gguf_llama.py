"""GGUF of architecture "llama" seen as a Hugging Face checkpoint: config, names, q/k rotation.

GGUF stores the rows of q and k so that rotation pairs neighbours (2i, 2i + 1); Hugging Face pairs
halves (i, i + D/2). `hf_tensor` undoes the permutation.
"""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np

from xdeepserve.errors import ModelFormatError
from xdeepserve.models.files.gguf_file import GGUFFile
from xdeepserve.ops import F32

_TOP_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS: Final = "rope_freqs.weight"
_LAYER_PATTERN: Final = re.compile(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)")

LLAMA3_ROPE: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The constants of every published Llama 3 scaling; a GGUF file keeps their result only."""


def hf_names(file: GGUFFile) -> dict[str, str]:
    """Hugging Face name -> GGUF name. Names we do not know map to themselves."""
    return {_hf_name(name): name for name in file.entries if name != _ROPE_FACTORS}


def hf_tensor(file: GGUFFile, config: dict[str, Any], gguf_name: str) -> F32:
    """The tensor `gguf_name` as float32 in Hugging Face row order."""
    values = file.tensor(gguf_name)
    if re.fullmatch(r"blk\.\d+\.attn_q\.(weight|bias)", gguf_name):
        return unpermute_rotary(values, config["num_attention_heads"])
    if re.fullmatch(r"blk\.\d+\.attn_k\.(weight|bias)", gguf_name):
        return unpermute_rotary(values, config["num_key_value_heads"])
    return values


def unpermute_rotary(values: F32, num_heads: int) -> F32:
    """Rows [heads x (D/2, 2)] of neighbours to [heads x (2, D/2)] of halves; weight or bias."""
    if values.shape[0] % (2 * num_heads):
        raise ModelFormatError(
            f"{values.shape[0]} rotary rows do not divide into {num_heads} heads of even size"
        )
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The config.json that describes `file`, synthesised from its metadata.

    Raises:
        ModelFormatError: another architecture, a missing key, or a feature we do not read.
    """
    fields = _Fields(file)
    fields.require_supported()
    embedding = file.entries.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFormatError(f"{file.path}: tensor token_embd.weight is missing or not a matrix")
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise ModelFormatError(f"{file.path}: llama.rope.dimension_count must be {head_dim}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": fields.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in file.entries,
        "mlp_bias": "blk.0.ffn_up.bias" in file.entries,
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, head_dim),
        "max_position_embeddings": fields.integer("context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.entries,
        **_special_ids(file.metadata),
    }


class _Fields:
    """Typed reads of the llama.* metadata."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._metadata = file.metadata

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._metadata.get(f"llama.{name}", default)
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self._wrong(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._metadata.get(f"llama.{name}", default)
        if type(value) is not float or not 0 < value < 1e30:
            raise self._wrong(name, value, "a positive number")
        # Shortest decimal form that is the same float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value)))

    def require_supported(self) -> None:
        """Refuse what the llama reader would read wrongly."""
        architecture = self._metadata.get("general.architecture")
        if architecture != "llama":
            raise ModelFormatError(
                f"{self._file.path}: GGUF architecture {architecture!r} is not supported, only "
                "'llama'; use the model's Hugging Face folder instead"
            )
        for key in ("llama.expert_count", "split.count"):
            if self._metadata.get(key, 0) not in (0, 1):
                raise ModelFormatError(
                    f"{self._file.path}: {key}={self._metadata[key]!r}: GGUF with experts or split "
                    "into several files is not supported; use the Hugging Face folder instead"
                )
        scaling = self._metadata.get("llama.rope.scaling.type", "none")
        if scaling != "none":
            raise ModelFormatError(
                f"{self._file.path}: llama.rope.scaling.type={scaling!r} is not supported in GGUF; "
                "use the model's Hugging Face folder instead"
            )

    def _wrong(self, name: str, value: Any, expected: str) -> ModelFormatError:
        return ModelFormatError(f"{self._file.path}: llama.{name}={value!r} must be {expected}")


def _hf_name(name: str) -> str:
    match = _LAYER_PATTERN.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return _TOP_NAMES.get(name, name)
    return f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _special_ids(metadata: dict[str, Any]) -> dict[str, Any]:
    """bos_token_id and eos_token_id; the end-of-turn id counts as an end too."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(token for token in ends if token is not None))
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    return {"bos_token_id": bos, "eos_token_id": eos[0] if len(eos) == 1 else eos}


def _rope_scaling(file: GGUFFile, head_dim: int) -> dict[str, Any] | None:
    """Llama 3's scaling recovered from the per-frequency divisors that GGUF keeps, if any."""
    if _ROPE_FACTORS not in file.entries:
        return None
    divisors = file.tensor(_ROPE_FACTORS).reshape(-1)
    if divisors.shape != (head_dim // 2,):
        raise ModelFormatError(
            f"{file.path}: tensor {_ROPE_FACTORS} has {divisors.size} values, "
            f"the head size asks for {head_dim // 2}"
        )
    if np.all(divisors == 1.0):
        return None
    theta = file.metadata.get("llama.rope.freq_base", 10000.0)
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3_ROPE}
    if not np.allclose(divisors, llama3_divisors(theta, head_dim, scaling), rtol=1e-3):
        raise ModelFormatError(
            f"{file.path}: the frequency factors in {_ROPE_FACTORS} are not Llama 3's scaling; "
            "use the model's Hugging Face folder instead"
        )
    return scaling


def llama3_divisors(theta: float, head_dim: int, scaling: dict[str, Any]) -> F32:
    """What Llama 3's rope scaling divides each of the head_dim/2 frequencies by.

    Source: the `llama3` rope type of the Llama 3.1 model cards' config.json.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    divisors = 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)
    rounded: F32 = divisors.astype(np.float32)
    return rounded
