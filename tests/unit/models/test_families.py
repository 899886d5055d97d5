"""config.json -> ModelSpec: what is read, and what is refused with the field and its value."""

from __future__ import annotations

import math
from typing import Any

import pytest

from xdeepserve.errors import ModelFormatError
from xdeepserve.models.families import family_of, parse_spec
from xdeepserve.models.rope import Llama3Scaling, RopeSpec, YarnScaling
from xdeepserve.models.spec import GqaSpec, MlaSpec
from xdeepserve.testing.toy_models import TOY_MODELS, toy_checkpoint


def config(name: str, **changes: Any) -> dict[str, Any]:
    """A toy's config.json with fields changed; a field set to `...` is removed."""
    merged = toy_checkpoint(name).config | changes
    return {field: value for field, value in merged.items() if value is not ...}


def test_llama_is_read() -> None:
    spec = parse_spec(config("llama"))
    assert spec.attention == GqaSpec(
        num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeSpec(10000.0, 16)
    )
    assert spec.num_layers == 2
    assert spec.tie_embeddings
    assert spec.moe is None
    assert spec.eos_token_ids == (2,)
    assert spec.kv_values_per_token() == 2 * 2 * 2 * 16


def test_defaults_of_absent_fields() -> None:
    absent = config("llama", num_key_value_heads=..., rope_theta=..., eos_token_id=None)
    spec = parse_spec(absent)
    assert isinstance(spec.attention, GqaSpec)
    assert spec.attention.num_kv_heads == 4
    assert spec.attention.rope.theta == 10000.0
    assert spec.eos_token_ids == ()


def test_several_eos_ids() -> None:
    assert parse_spec(config("llama", eos_token_id=[2, 7])).eos_token_ids == (2, 7)


def test_both_styles_of_rope_fields_mean_the_same() -> None:
    llama3 = config("llama3")
    rope = dict(llama3["rope_parameters"])
    version4 = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert parse_spec(config("llama3", rope_parameters=..., **version4)) == parse_spec(llama3)


def test_llama3_scaling_is_read() -> None:
    spec = parse_spec(config("llama3"))
    assert spec.attention.rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 64)


def test_original_max_positions_defaults_to_the_models() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0}
    rope = parse_spec(config("llama", rope_scaling=scaling)).attention.rope
    assert isinstance(rope.scaling, YarnScaling)
    assert rope.scaling.original_max_positions == 512


def test_yarn_mscale_reaches_the_score_scale() -> None:
    spec = parse_spec(config("deepseek_v3"))
    assert isinstance(spec.attention, MlaSpec)
    mscale = 0.1 * 0.8 * math.log(8.0) + 1.0
    assert spec.attention.scale == pytest.approx(40**-0.5 * mscale**2, rel=1e-12)


def test_kimi_k2_is_deepseek_v3() -> None:
    deepseek = config("deepseek_v3")
    assert parse_spec(deepseek | {"model_type": "kimi_k2"}) == parse_spec(deepseek)


def test_moe_layers() -> None:
    assert parse_spec(config("deepseek_v3")).moe_layers == (False, True, True)
    assert parse_spec(config("mixtral")).moe_layers == (True, True)
    assert parse_spec(config("qwen3_moe")).moe_layers == (False, False, False, True)
    every = config("qwen3_moe", decoder_sparse_step=1, mlp_only_layers=...)
    assert parse_spec(every).moe_layers == (True,) * 4


def test_no_shared_experts() -> None:
    spec = parse_spec(config("glm4_moe", n_shared_experts=0))
    assert spec.moe is not None
    assert spec.moe.shared_intermediate_size == 0


@pytest.mark.parametrize("name", TOY_MODELS)
def test_parameter_count(name: str) -> None:
    checkpoint = toy_checkpoint(name)
    spec = parse_spec(checkpoint.config)
    total = sum(math.prod(s) for s in checkpoint.shapes.values() if len(s) == 2)
    routers = sum(math.prod(checkpoint.shapes[n]) for n in checkpoint.shapes if "gate.weight" in n)
    assert spec.num_parameters() == total - routers
    assert 0 < spec.num_active_parameters() <= spec.num_parameters() + spec.vocab_size * 64
    assert family_of(spec).name == spec.family


def test_windows_that_never_bite_are_accepted() -> None:
    parse_spec(config("qwen2", use_sliding_window=True, max_window_layers=2))
    parse_spec(config("qwen2", layer_types=["full_attention"] * 2))
    parse_spec(config("mixtral", sliding_window=512))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gpt2"}, "model_type='gpt2'"),
    ("llama", {"model_type": ...}, "'model_type' is missing"),
    ("llama", {"model_type": ["llama"]}, "model_type=['llama']"),
    ("llama", {"hidden_size": ...}, "'hidden_size' is missing"),
    ("llama", {"hidden_size": 0}, "hidden_size=0"),
    ("llama", {"hidden_size": -64}, "hidden_size=-64"),
    ("llama", {"hidden_size": 10**9}, "hidden_size=1000000000"),
    ("llama", {"hidden_size": "64"}, "hidden_size='64'"),
    ("llama", {"hidden_size": 64.0}, "hidden_size=64.0"),
    ("llama", {"hidden_size": True}, "hidden_size=True"),
    ("llama", {"hidden_size": 66}, "num_attention_heads=4"),
    ("llama", {"vocab_size": 10**12}, "vocab_size="),
    ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
    ("llama", {"num_hidden_layers": [2]}, "num_hidden_layers=[2]"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads=0"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ("llama", {"num_key_value_heads": 8}, "num_key_value_heads=8"),
    ("llama", {"head_dim": 15}, "rotary_dim=15"),
    ("llama", {"head_dim": 1 << 30}, "head_dim="),
    ("llama", {"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    ("llama", {"rms_norm_eps": math.nan}, "rms_norm_eps=nan"),
    ("llama", {"rms_norm_eps": math.inf}, "rms_norm_eps=inf"),
    ("llama", {"rms_norm_eps": None}, "'rms_norm_eps' is missing"),
    ("llama", {"max_position_embeddings": 1 << 40}, "max_position_embeddings="),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"eos_token_id": 320}, "eos_token_id=320"),
    ("llama", {"eos_token_id": -1}, "eos_token_id=-1"),
    ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id=[1, '2']"),
    ("llama", {"rope_theta": "10000"}, "rope_theta='10000'"),
    ("llama", {"rope_theta": -1.0}, "rope_theta"),
    ("llama", {"rope_scaling": 3}, "rope_scaling"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "'factor' is missing"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor=0"),
    ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ("qwen2", {"use_sliding_window": True}, "sliding_window=128"),
    ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
    ("mixtral", {"sliding_window": 64}, "sliding_window=64"),
    ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5"),
    ("mixtral", {"num_local_experts": 0}, "num_local_experts=0"),
    ("qwen3_moe", {"mlp_only_layers": [9]}, "mlp_only_layers=[9]"),
    ("qwen3_moe", {"num_experts": ...}, "num_local_experts"),
    ("deepseek_v3", {"n_group": 3}, "n_group=3"),
    ("deepseek_v3", {"n_group": 16}, "n_group=16"),
    ("deepseek_v3", {"topk_group": 5}, "topk_group=5"),
    ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
    ("deepseek_v3", {"first_k_dense_replace": 4}, "first_k_dense_replace=4"),
    ("deepseek_v3", {"kv_lora_rank": ...}, "'kv_lora_rank' is missing"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5"),
    ("glm4_moe", {"partial_rotary_factor": 0.01}, "rotary_dim=0"),
    ("glm4_moe", {"routed_scaling_factor": "1"}, "routed_scaling_factor='1'"),
]


@pytest.mark.parametrize(("name", "changes", "message"), BAD)
def test_bad_fields_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFormatError) as caught:
        parse_spec(config(name, **changes))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("values", [[], None, "llama", 3])
def test_config_must_be_an_object(values: Any) -> None:
    with pytest.raises(ModelFormatError, match="must be a JSON object"):
        parse_spec(values)
