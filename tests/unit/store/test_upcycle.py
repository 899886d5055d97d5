"""Upcycling keeps the function and makes a proper glm4_moe folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.models.file_toys import LLAMA_CONFIG, llama_folder, llama_gguf, llama_tensors
from xdeepserve.errors import ConfigError
from xdeepserve.models.checkpoint import open_checkpoint
from xdeepserve.models.families import parse_spec
from xdeepserve.models.loader import load_model
from xdeepserve.ops import F32, WeightDtype
from xdeepserve.ops.reference import ReferenceOps
from xdeepserve.store import UpcycleOptions, convert_gguf, model_info, upcycle
from xdeepserve.testing.model_runner import SoloRunner

TOKENS = [1, 7, 30, 2, 19, 19, 41, 5, 0, 47, 11, 12]


def logits(path: Path, cache: Path) -> F32:
    model = load_model(path, dtype=WeightDtype.FLOAT32, ops=ReferenceOps(), cache_dir=cache)
    return SoloRunner(model).append(TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        UpcycleOptions(experts=8, top_k=2),
        UpcycleOptions(experts=4, top_k=4, dense_layers=0),
        UpcycleOptions(experts=2, top_k=1, dense_layers=2, seed=5),
    ],
)
def test_computes_the_same_function(options: UpcycleOptions, tmp_path: Path) -> None:
    dense = llama_folder(tmp_path / "dense")
    upcycle(dense, tmp_path / "moe", options)
    before, after = logits(dense, tmp_path / "c"), logits(tmp_path / "moe", tmp_path / "c")
    assert np.abs(before).max() > 1.0
    assert np.abs(before - after).max() < 2e-5 * np.abs(before).max()
    spec = parse_spec(open_checkpoint(tmp_path / "moe").config)
    assert spec.family == "glm4_moe"
    assert sum(spec.moe_layers) == 3 - options.dense_layers
    assert spec.moe is not None
    assert spec.moe.gate.num_experts == options.experts


def test_halves_are_exact_and_every_expert_is_the_same(tmp_path: Path) -> None:
    dense = llama_tensors()
    upcycle(llama_folder(tmp_path / "dense"), tmp_path / "moe", UpcycleOptions(experts=3))
    moe = open_checkpoint(tmp_path / "moe")
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp"
        for part, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            shared = moe.tensor(f"{prefix}.shared_experts.{part}.weight")
            for expert in range(3):
                routed = moe.tensor(f"{prefix}.experts.{expert}.{part}.weight")
                whole = np.concatenate([shared, routed], axis=axis)
                assert np.array_equal(whole, dense[f"{prefix}.{part}.weight"])
    assert np.array_equal(
        moe.tensor("model.layers.0.mlp.up_proj.weight"), dense["model.layers.0.mlp.up_proj.weight"]
    )


def test_router_is_random_and_seeded(tmp_path: Path) -> None:
    dense = llama_folder(tmp_path / "dense")
    gates: dict[str, F32] = {}
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        upcycle(dense, tmp_path / name, UpcycleOptions(seed=seed))
        moe = open_checkpoint(tmp_path / name)
        gates[name] = moe.tensor("model.layers.1.mlp.gate.weight")
        bias = moe.tensor("model.layers.1.mlp.gate.e_score_correction_bias")
        assert len(set(bias.tolist())) == 8
        assert not np.array_equal(gates[name], moe.tensor("model.layers.2.mlp.gate.weight"))
    assert np.array_equal(gates["a"], gates["b"])
    assert not np.array_equal(gates["a"], gates["c"])


def test_config_and_companion_files_are_kept(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    dense = llama_folder(tmp_path / "dense", {**LLAMA_CONFIG, "rope_scaling": scaling})
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    upcycle(dense, tmp_path / "moe", UpcycleOptions())
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    for name in ("rope_theta", "head_dim", "tie_word_embeddings", "eos_token_id", "torch_dtype"):
        assert config[name] == LLAMA_CONFIG[name]
    assert config["rope_scaling"] == scaling
    assert config["partial_rotary_factor"] == 1.0
    assert (tmp_path / "moe" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "moe" / "tokenizer.json").read_bytes() == b"{}"
    assert open_checkpoint(tmp_path / "moe").dtype("model.norm.weight") == "BF16"


def test_info(tmp_path: Path) -> None:
    upcycle(llama_folder(tmp_path / "dense"), tmp_path / "moe", UpcycleOptions(experts=4, top_k=2))
    dense, moe = model_info(tmp_path / "dense"), model_info(tmp_path / "moe")
    assert (dense.family, dense.num_experts, dense.num_moe_layers) == ("llama", 0, 0)
    assert (moe.family, moe.num_experts, moe.top_k, moe.num_moe_layers) == ("glm4_moe", 4, 2, 2)
    assert moe.num_layers == 3
    assert moe.dtype == "BF16"
    assert moe.max_position_embeddings == 64
    # Two MoE layers have 2.5 times the FFN of a dense one, and 1.5 times of it is active.
    ffn = 3 * 32 * 64
    assert moe.num_parameters - dense.num_parameters == 2 * 1.5 * ffn
    assert moe.num_active_parameters - dense.num_active_parameters == 2 * 0.5 * ffn
    files = (tmp_path / "moe" / "config.json", tmp_path / "moe" / "model.safetensors")
    assert moe.size_bytes == sum(file.stat().st_size for file in files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 1}, "experts=1"),
        ({"experts": 100_000}, "experts=100000"),
        ({"experts": 4, "top_k": 5}, "top_k=5"),
        ({"top_k": 0}, "top_k=0"),
        ({"shared": 0}, "shared=0"),
        ({"shared": 2}, "shared=2"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpcycleOptions(**options)


@pytest.mark.parametrize(
    ("changes", "dense_layers", "message"),
    [
        ({}, 3, "dense_layers=3"),
        ({}, -1, "dense_layers=-1"),
        ({"model_type": "qwen2"}, 1, "'qwen2'"),
        ({"attention_bias": True}, 1, "attention_bias"),
        ({"intermediate_size": 63}, 1, "odd"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    changes: dict[str, Any], dense_layers: int, message: str, tmp_path: Path
) -> None:
    dense = llama_folder(tmp_path / "dense", {**LLAMA_CONFIG, **changes}, llama_tensors())
    with pytest.raises(ConfigError, match=message):
        upcycle(dense, tmp_path / "moe", UpcycleOptions(dense_layers=dense_layers))
    assert not (tmp_path / "moe").exists()


def test_existing_target_is_refused(tmp_path: Path) -> None:
    dense = llama_folder(tmp_path / "dense")
    with pytest.raises(ConfigError, match="exists already"):
        upcycle(dense, dense, UpcycleOptions())


def test_gguf_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="GGUF"):
        upcycle(llama_gguf(tmp_path / "m.gguf"), tmp_path / "moe", UpcycleOptions())


def test_converted_gguf_is_the_same_model(tmp_path: Path) -> None:
    tokenizer = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    gguf = llama_gguf(tmp_path / "m.gguf", tokenizer=tokenizer)
    done: list[tuple[str, int, int]] = []
    convert_gguf(gguf, tmp_path / "m", progress=lambda *step: done.append(step))
    cache = tmp_path / "c"
    assert np.array_equal(logits(tmp_path / "m", cache), logits(gguf, cache))
    assert done[-1][0] == "write"
    assert done[-1][1] == done[-1][2]
    assert open_checkpoint(tmp_path / "m").config["torch_dtype"] == "bfloat16"
