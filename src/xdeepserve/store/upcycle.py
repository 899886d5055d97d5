"""Upcycling: a dense llama checkpoint as a mixture of experts that computes the same function.

    dense FFN, I neurons            MoE layer
    [ first half | second half ] -> [ shared expert = first half ]
                                    [ every routed expert = second half ]  weights sum to 1

Each routed expert is the same copy and the top-k weights are renormalized to one, so whatever the
(random) router picks, shared + routed is the dense FFN up to the rounding of that sum. The result
is a glm4_moe checkpoint: grouped-query attention, sigmoid router with a correction bias, shared
expert, first layers dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from xdeepserve.errors import ConfigError
from xdeepserve.models.checkpoint import FileCheckpoint, open_checkpoint
from xdeepserve.models.families import parse_spec
from xdeepserve.models.files.checkpoint_writer import write_hf_folder
from xdeepserve.models.files.safetensors_file import TensorPlan
from xdeepserve.models.files.source_digest import Progress
from xdeepserve.ops import F32

MAX_EXPERTS: Final = 256
BIAS_SPREAD: Final = 0.02
"""Standard deviation of the router's correction bias."""

COMPANION_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)

_KEPT_FIELDS: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype",
    "dtype",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleOptions:
    """Shape of the mixture.

    Attributes:
        experts: routed experts per MoE layer.
        top_k: routed experts per token.
        shared: shared experts; only 1 is supported.
        dense_layers: first layers that stay dense; at least one MoE layer must remain.
        seed: of the random router.
    """

    experts: int = 8
    top_k: int = 2
    shared: int = 1
    dense_layers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.experts <= MAX_EXPERTS:
            raise ConfigError(f"experts={self.experts} must be between 2 and {MAX_EXPERTS}")
        if not 1 <= self.top_k <= self.experts:
            raise ConfigError(f"top_k={self.top_k} must be between 1 and experts={self.experts}")
        if self.shared != 1:
            raise ConfigError(f"shared={self.shared} is not supported; use 1 shared expert")
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must not be negative")


def upcycle(
    src: Path, dst: Path, options: UpcycleOptions, *, progress: Progress | None = None
) -> None:
    """Write the dense checkpoint folder `src` as the mixture-of-experts folder `dst`.

    Dense weights keep their values and number format exactly; routers are float32.

    Raises:
        ConfigError: `dst` exists, or the options do not fit the model.
        ModelFormatError: `src` is damaged.
    """
    source = open_checkpoint(src)
    _check(source, src, options)
    plans = [plan for name in sorted(source.names()) for plan in _plans(source, name, options)]

    def on_progress(done: int, total: int) -> None:
        if progress is not None:
            progress("write", done, total)

    write_hf_folder(
        dst,
        config=_config(source.config, options),
        tensors=[*plans, *_router_plans(source.config, options)],
        files=_companions(src),
        on_progress=on_progress,
    )


def _check(source: FileCheckpoint, src: Path, options: UpcycleOptions) -> None:
    config = source.config
    if config.get("model_type") != "llama":
        raise ConfigError(
            f"{src} is a {config.get('model_type')!r} model; only dense 'llama' models can be "
            "upcycled"
        )
    if not src.is_dir() or len(source.files) == 1:
        raise ConfigError(
            f"{src} is a GGUF file; convert it to a folder with `models convert` first"
        )
    spec = parse_spec(config)
    if config.get("attention_bias"):
        raise ConfigError(f"{src}: attention_bias=true is not supported when upcycling")
    if spec.intermediate_size % 2:
        raise ConfigError(
            f"{src}: intermediate_size={spec.intermediate_size} is odd; it must split in halves"
        )
    if not 0 <= options.dense_layers < spec.num_layers:
        raise ConfigError(
            f"dense_layers={options.dense_layers} must be between 0 and {spec.num_layers - 1}, "
            f"the model has {spec.num_layers} layers and at least one must become an MoE layer"
        )


def _config(dense: dict[str, Any], options: UpcycleOptions) -> dict[str, Any]:
    kept = {name: dense[name] for name in _KEPT_FIELDS if dense.get(name) is not None}
    if dense.get("rope_parameters") is not None:
        kept["rope_parameters"] = {**dense["rope_parameters"], "partial_rotary_factor": 1.0}
    heads = dense["num_attention_heads"]
    return {
        **kept,
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "hidden_act": "silu",
        "head_dim": dense.get("head_dim") or dense["hidden_size"] // heads,
        "num_key_value_heads": dense.get("num_key_value_heads") or heads,
        "tie_word_embeddings": bool(dense.get("tie_word_embeddings", False)),
        "attention_bias": False,
        "use_qk_norm": False,
        "partial_rotary_factor": 1.0,
        "first_k_dense_replace": options.dense_layers,
        "moe_intermediate_size": dense["intermediate_size"] // 2,
        "n_routed_experts": options.experts,
        "n_shared_experts": options.shared,
        "num_experts_per_tok": options.top_k,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
    }


def _plans(source: FileCheckpoint, name: str, options: UpcycleOptions) -> Iterator[TensorPlan]:
    """What becomes of one dense tensor: itself, or halves for shared and routed experts."""
    layer, part = _ffn_part(name)
    stored = source.dtype(name)
    dtype = stored if stored in ("F16", "BF16") else "F32"
    if layer < options.dense_layers:
        yield TensorPlan(name, source.shape(name), lambda: source.tensor(name), dtype)
        return
    prefix = f"model.layers.{layer}.mlp"
    axis = 1 if part == "down_proj" else 0
    shape = list(source.shape(name))
    shape[axis] //= 2
    targets = [f"{prefix}.shared_experts.{part}.weight"]
    targets += [f"{prefix}.experts.{e}.{part}.weight" for e in range(options.experts)]
    for target in targets:
        half = 0 if target is targets[0] else 1
        yield TensorPlan(target, tuple(shape), _half(source, name, axis, half), dtype)


def _half(source: FileCheckpoint, name: str, axis: int, half: int) -> Callable[[], F32]:
    return lambda: np.split(source.tensor(name), 2, axis=axis)[half]


def _ffn_part(name: str) -> tuple[int, str]:
    """(layer, projection) of an FFN weight; (-1, "") of any other tensor."""
    words = name.split(".")
    if len(words) == 6 and words[3] == "mlp" and words[2].isdecimal():
        return int(words[2]), words[4]
    return -1, ""


def _router_plans(dense: dict[str, Any], options: UpcycleOptions) -> Iterator[TensorPlan]:
    """Random float32 routers; each layer's numbers depend on (seed, layer) alone."""
    hidden, experts = dense["hidden_size"], options.experts
    for layer in range(options.dense_layers, dense["num_hidden_layers"]):
        gate = f"model.layers.{layer}.mlp.gate"
        rng = np.random.Generator(np.random.Philox(key=[options.seed, layer]))
        weight = (rng.standard_normal((experts, hidden)) / hidden**0.5).astype(np.float32)
        bias = (rng.standard_normal(experts) * BIAS_SPREAD).astype(np.float32)
        yield TensorPlan(f"{gate}.weight", weight.shape, _constant(weight), "F32")
        yield TensorPlan(f"{gate}.e_score_correction_bias", bias.shape, _constant(bias), "F32")


def _constant(values: F32) -> Callable[[], F32]:
    return lambda: values


def _companions(src: Path) -> dict[str, bytes]:
    return {name: (src / name).read_bytes() for name in COMPANION_FILES if (src / name).is_file()}
