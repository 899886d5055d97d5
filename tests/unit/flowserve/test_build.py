"""build_engine: how large the pool is, how long a request may be, and what is refused."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from tests.toys import toy_model
from tests.unit.flowserve.builders import make_config, make_request
from xdeepserve.errors import ConfigError
from xdeepserve.flowserve.build import (
    build_dp_group,
    build_engine,
    num_kv_blocks,
    resolve_max_model_len,
)
from xdeepserve.messages import FinishReason
from xdeepserve.transformerless.stage_times import Stage, StageTimes


def test_the_pool_is_as_large_as_its_bytes() -> None:
    config = make_config(num_kv_blocks=0, kv_cache_bytes=1 << 20, block_size=16)
    assert num_kv_blocks(config, 1024) == 64
    assert num_kv_blocks(make_config(num_kv_blocks=7), 1024) == 7
    with pytest.raises(ConfigError, match="holds no KV block of 1048576 bytes"):
        num_kv_blocks(make_config(num_kv_blocks=0, kv_cache_bytes=1000), 1 << 18)


def test_the_context_is_capped_by_the_pool_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        limit = resolve_max_model_len(make_config(), max_positions=4096, capacity=256)
    assert limit == 256
    assert "max_model_len is 256 instead of the model's 4096" in caplog.text


def test_an_asked_context_is_kept_or_refused() -> None:
    config = make_config(max_model_len=100)
    assert resolve_max_model_len(config, max_positions=4096, capacity=256) == 100
    with pytest.raises(ConfigError, match="exceeds the model's 64 positions"):
        resolve_max_model_len(config, max_positions=64, capacity=256)
    with pytest.raises(ConfigError, match="exceeds the KV cache's 80 tokens"):
        resolve_max_model_len(config, max_positions=4096, capacity=80)
    with pytest.raises(ConfigError, match="no room"):
        resolve_max_model_len(make_config(max_model_len=1), max_positions=9, capacity=9)


async def test_a_built_engine_tells_its_limits_and_answers() -> None:
    model = toy_model("glm4_moe")
    config = make_config(num_kv_blocks=0, kv_cache_bytes=40 * 4 * model.kv_format.bytes_per_token)
    client = build_engine(model=model, model_name="toy", config=config)
    client.start()
    info = client.info
    assert (info.model, info.family, info.dtype) == ("toy", "glm4_moe", "float32")
    assert (info.num_kv_blocks, info.block_size, info.max_model_len) == (40, 4, 160)
    async with asyncio.timeout(30):
        request = make_request("a", [5, 6, 7], temperature=0.0, ignore_eos=True)
        outputs = [output async for output in client.generate(request=request)]
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].usage.num_output_tokens == 4
    await client.close(drain_timeout_s=30)


def test_a_group_names_its_thread_and_counts_its_stages() -> None:
    times = StageTimes()
    group = build_dp_group(
        model=toy_model("glm4_moe"),
        model_name="toy",
        config=make_config(),
        stage_times=times,
        name="xds:dp7",
    )
    group.start(lambda outputs: None)  # with the one token of the warm-up
    assert "xds:dp7" in {thread.name for thread in threading.enumerate()}
    group.begin_close(drain_timeout_s=0)
    assert group.join(timeout_s=30)
    computing = {Stage.INPUTS, Stage.LAYERS, Stage.HEAD, Stage.SAMPLE}
    assert set(times.counts()) == computing
