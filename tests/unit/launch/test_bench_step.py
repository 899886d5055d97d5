"""`bench step`: what it counts is the engine's, and adds up."""

from __future__ import annotations

import pytest

from tests.toys import toy_model
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.launch.bench_step import measure
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
    found = measure(group, times, ops, batch=3, input_len=20, num_steps=4)
    assert found.operator_calls["paged_attention"] == len(model.layers)
    assert found.operator_calls["permute"] == sum(model.spec.moe_layers)
    assert found.operator_calls["lm_head"] == found.operator_calls["embed"] == 1
    stages = {"schedule", "inputs", "layers", "head", "sample", "update"}
    assert set(found.stages_us) == stages
    assert 0 < sum(found.operators_us.values()) < sum(found.stages_us.values()) < found.step_us
    assert found.outside_us > 0
    assert group.load().num_running == group.load().num_waiting == 0
