"""build_engine: a model and limits -> a stopped engine. Decides the size of the KV pool."""

from __future__ import annotations

import logging
import os

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.config import EngineConfig
from xdeepserve.errors import ConfigError
from xdeepserve.flowserve.dp_group import DEFAULT_NAME, DPGroup
from xdeepserve.flowserve.engine_client import InProcClient
from xdeepserve.flowserve.executor import InProcExecutor
from xdeepserve.flowserve.ngram_proposer import NgramProposer
from xdeepserve.flowserve.scheduler import Scheduler
from xdeepserve.flowserve.speculator import Speculator
from xdeepserve.messages import EngineInfo
from xdeepserve.models.decoder import Model
from xdeepserve.rtc import KVCacheManager
from xdeepserve.transformerless.moe_transport import MoeTransport
from xdeepserve.transformerless.stage_times import StageTimes

logger = logging.getLogger(__name__)


def build_engine(
    *,
    model: Model,
    model_name: str,
    config: EngineConfig,
    clock: Clock = SYSTEM_CLOCK,
    stage_times: StageTimes | None = None,
) -> InProcClient:
    """Build a colocated engine: one DP group with the experts in its process.

    Args:
        model: loaded and ready.
        model_name: the name that `EngineInfo` reports.
        config: budgets and KV pool.
        clock: for heartbeats and drain.
        stage_times: where the stages of steps are counted; None = nowhere else.

    Returns:
        The client; `start` it from any thread, use it on one event loop, `close` it.

    Raises:
        ConfigError: the KV pool is too small for the asked context, or for anything.
    """
    group = build_dp_group(
        model=model,
        model_name=model_name,
        config=config,
        clock=clock,
        stage_times=stage_times,
    )
    return InProcClient(group)


def build_dp_group(
    *,
    model: Model,
    model_name: str,
    config: EngineConfig,
    clock: Clock = SYSTEM_CLOCK,
    transport: MoeTransport | None = None,
    stage_times: StageTimes | None = None,
    name: str = DEFAULT_NAME,
) -> DPGroup:
    """A DP group, not started; tests step it by hand.

    Args:
        transport: leads to the FFNs and experts, owned by the group from now on; None = they are
            computed in this process.
        name: of the step loop's thread.
        model, model_name, config, clock, stage_times: see `build_engine`.

    Raises:
        ConfigError: as `build_engine`.
    """
    with_mtp = config.speculation == "mtp"
    check_speculation(config, model_name, has_mtp=model.mtp is not None)
    info = engine_info(model, model_name, config)
    times = stage_times or StageTimes()
    executor = InProcExecutor(
        model=model,
        transport=transport,
        stage_times=times,
        num_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        num_microbatches=config.num_microbatches or (1 if transport is None else None),
        with_mtp=with_mtp,
    )
    kv = KVCacheManager(
        num_blocks=info.num_kv_blocks,
        block_size=info.block_size,
        prefix_caching=config.prefix_caching,
    )
    scheduler = Scheduler(
        config=config,
        kv=kv,
        max_model_len=info.max_model_len,
        eos_token_ids=info.eos_token_ids,
        speculator=_speculator(config),
    )
    return DPGroup(
        info=info,
        scheduler=scheduler,
        executor=executor,
        clock=clock,
        max_num_waiting=config.max_num_waiting,
        stage_times=times,
        name=name,
    )


def _speculator(config: EngineConfig) -> Speculator | None:
    if config.speculation == "off":
        return None
    proposer = NgramProposer() if config.speculation == "ngram" else None
    return Speculator(proposer, num_speculative_tokens=config.num_speculative_tokens)


def engine_info(model: Model, model_name: str, config: EngineConfig) -> EngineInfo:
    """What a DP group with these limits would be like; nothing is made.

    Raises:
        ConfigError: as `build_engine`.
    """
    num_kv_layers = model.spec.num_layers + (config.speculation == "mtp")
    kv_bytes_per_token = model.kv_format.bytes_per_token * num_kv_layers // model.spec.num_layers
    num_blocks = num_kv_blocks(config, kv_bytes_per_token)
    max_model_len = resolve_max_model_len(
        config,
        max_positions=model.spec.max_position_embeddings,
        capacity=num_blocks * config.block_size,
    )
    return EngineInfo(
        model=model_name,
        family=model.spec.family,
        dtype=str(model.dtype),
        vocab_size=model.spec.vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=model.spec.eos_token_ids,
        num_kv_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
    )


def check_speculation(config: EngineConfig, model_name: str, *, has_mtp: bool) -> None:
    """Refuse drafts by a layer that the model does not have.

    Raises:
        ConfigError: so it is.
    """
    if config.speculation == "mtp" and not has_mtp:
        raise ConfigError(
            f"speculation='mtp' needs a layer for multi-token prediction, which {model_name} does "
            "not carry; use speculation='ngram' or 'off'"
        )


def num_kv_blocks(config: EngineConfig, kv_bytes_per_token: int) -> int:
    """Blocks of the pool: as configured, or as many as `kv_cache_bytes` holds.

    Raises:
        ConfigError: not even one block fits, or the pool exceeds the machine's memory.
    """
    block_bytes = kv_bytes_per_token * config.block_size
    num_blocks = config.num_kv_blocks or config.kv_cache_bytes // block_bytes
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_blocks * block_bytes > memory_bytes:
        raise ConfigError(
            f"{num_blocks} KV blocks of {block_bytes} bytes exceed this machine's memory of "
            f"{memory_bytes} bytes; lower num_kv_blocks or kv_cache_bytes"
        )
    if num_blocks < 1:
        raise ConfigError(
            f"kv_cache_bytes={config.kv_cache_bytes} holds no KV block of {block_bytes} bytes; "
            "raise kv_cache_bytes or lower block_size"
        )
    return num_blocks


def resolve_max_model_len(config: EngineConfig, *, max_positions: int, capacity: int) -> int:
    """The longest prompt + output the engine takes.

    Args:
        config: max_model_len 0 = as long as model and pool allow.
        max_positions: the model's limit.
        capacity: tokens the KV pool holds; one request must fit alone.

    Raises:
        ConfigError: more was asked for than the model or the pool allows, or nothing fits.
    """
    asked = config.max_model_len
    if asked > max_positions:
        raise ConfigError(
            f"max_model_len={asked} exceeds the model's {max_positions} positions; lower it"
        )
    if asked > capacity:
        raise ConfigError(
            f"max_model_len={asked} exceeds the KV cache's {capacity} tokens; "
            "raise kv_cache_bytes (or num_kv_blocks), or lower max_model_len"
        )
    limit = asked or min(max_positions, capacity)
    if limit < 2:
        raise ConfigError(f"max_model_len={limit} leaves no room for a prompt and an output token")
    if not asked and capacity < max_positions:
        logger.warning(
            "max_model_len is %d instead of the model's %d, because the KV cache holds no more; "
            "raise kv_cache_bytes for longer contexts",
            limit,
            max_positions,
        )
    return limit
