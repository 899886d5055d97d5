"""`bench step`: what it counts is the engine's, and adds up."""

from __future__ import annotations

import pytest

from tests.toys import toy_model
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.launch.bench_step import measure
from xdeepserve.launch.step_bytes import read_bytes
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.testing.fake_clock import FakeClock
from xdeepserve.transformerless.stage_times import StageTimes


@pytest.mark.parametrize("budget", [8, 256], ids=["prefill in many steps", "prefill in one"])
def test_stages_and_operators_of_decode_steps(budget: int) -> None:
    model = toy_model("glm4_moe", "bf16", "cpu")
    ops = model.ops
    assert isinstance(ops, CpuOps)
    times = StageTimes()
    config = EngineConfig(max_num_batched_tokens=budget, num_kv_blocks=64, max_num_seqs=8)
    group = build_dp_group(
        model=model, model_name="toy", config=config, clock=FakeClock(), stage_times=times
    )
    found = measure(group, times, model, batch=3, input_len=20, num_steps=4)
    assert found.read_bytes == read_bytes(model, batch=3, context=22)
    assert found.read_gb_per_s > 0
    assert found.operator_calls["paged_attention"] == len(model.layers)
    assert found.operator_calls["permute"] == sum(model.spec.moe_layers)
    assert found.operator_calls["lm_head"] == found.operator_calls["embed"] == 1
    stages = {"schedule", "inputs", "layers", "head", "sample", "update"}
    assert set(found.stages_us) == stages
    assert 0 < sum(found.operators_us.values()) < sum(found.stages_us.values()) < found.step_us
    assert found.outside_us > 0
    assert group.load().num_running == group.load().num_waiting == 0


def test_a_step_reads_weights_caches_and_chosen_experts_once() -> None:
    model = toy_model("qwen3_moe", "bf16", "cpu")
    gate = model.spec.moe.gate if model.spec.moe else None
    assert gate is not None
    layers = model.stack.layers
    experts = sum(
        weight.data.nbytes
        for layer in layers
        if layer.experts is not None
        for weight in (layer.experts.gate_up, layer.experts.down)
    )
    cached = model.kv_format.bytes_per_token
    one, two = (read_bytes(model, batch=batch, context=10) for batch in (1, 2))
    share = gate.top_k / gate.num_experts
    assert two - one == pytest.approx(10 * cached + experts * share * (1 - share), abs=len(layers))
    assert read_bytes(model, batch=1, context=11) - one == cached
    dense = one - 10 * cached - share * experts
    frame = layers[0].attention
    assert dense > model.head.lm_head.data.nbytes + len(layers) * frame.output.data.nbytes
