"""The models of the comparison as Hugging Face folders; `convert` keeps what is made of them.

As a program: writes all of them. The random ones have the tokenizer of SmolLM2, because servers
want one.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.environment import peers_folder, virtual_environment

from xdeepserve import store
from xdeepserve.models.files.checkpoint_writer import write_hf_folder
from xdeepserve.models.files.safetensors_file import TensorPlan
from xdeepserve.testing.toy_models import ToyCheckpoint, toy_checkpoint

DENSE, UPCYCLED = "smollm2-135m", "smollm2-135m-moe8"

_RANDOM_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 49152,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

RANDOM_MODELS: Final[dict[str, dict[str, Any]]] = {
    "qwen3-moe-random": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 3072,
        "num_experts": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "deepseek-v3-random": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": 12,
        "num_key_value_heads": 16,
        "q_lora_rank": 768,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 3072,
        "first_k_dense_replace": 1,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "attention_bias": False,
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
    },
}
"""What differs from `_RANDOM_COMMON` in config.json; 0.95 and 0.78 billion parameters."""

MODELS: Final = (DENSE, UPCYCLED, *RANDOM_MODELS)

CONVERTER_REQUIREMENTS: Final = (
    "torch==2.13.0",
    "transformers==5.24.0",
    "sentencepiece==0.2.1",
    "protobuf",
    "gguf==0.19.0",
)
"""Of the environment that the transformers peer and llama.cpp's converter share."""


def checkpoint(name: str) -> Path:
    """The Hugging Face folder of a model of MODELS, or of whatever `store.resolve` knows."""
    if name not in RANDOM_MODELS:
        return store.resolve(name)
    folder = peers_folder() / "models" / name
    if folder.exists():
        return folder
    toy = random_checkpoint(name)
    plans = [
        TensorPlan(tensor, shape, partial(toy.tensor, tensor), "BF16")
        for tensor, shape in toy.shapes.items()
    ]
    tokenizer = store.resolve(DENSE)
    files = {
        name: (tokenizer / name).read_bytes()
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    print(f"writing {folder}", flush=True)
    write_hf_folder(folder, config=toy.config, tensors=plans, files=files)
    return folder


def random_checkpoint(name: str) -> ToyCheckpoint:
    """A model of RANDOM_MODELS, before it is written."""
    config = _RANDOM_COMMON | RANDOM_MODELS[name]
    return toy_checkpoint(config["model_type"], **config)


def converted(name: str, make: Callable[[Path], None]) -> Path:
    """The file or folder `name` among the converted models; `make` writes it at a scratch path.

    Raises:
        Unavailable: from `make`.
    """
    target = peers_folder() / "converted" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{os.getpid()}.{name}")
    print(f"writing {target}", flush=True)
    try:
        make(scratch)
        scratch.rename(target)
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch)
        else:
            scratch.unlink(missing_ok=True)
    return target


def converter_python() -> Path:
    """A Python with torch and transformers."""
    return virtual_environment("transformers", CONVERTER_REQUIREMENTS)


def main() -> int:
    """Write every checkpoint."""
    for name in MODELS:
        print(checkpoint(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
