"""Frozen configuration, one dataclass per room, every field documented and validated.

`launch` builds these from flags; nobody mutates them. The field's `doc` is its CLI help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from xdeepserve.errors import ConfigError

T = TypeVar("T")


def option(default: T, doc: str) -> T:
    """A dataclass field with a default and a one-line help text (read by the CLI)."""
    declared: Any = field(default=default, metadata={"doc": doc})
    return declared  # type: ignore[no-any-return]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value >= 1, f"{name}={value} must be at least 1")


MAX_THREADS = 1024
"""What the native thread pool takes."""

MAX_MICROBATCHES = 4
"""More are more exchanges under way than a pair of ranks has slots for."""

SPECULATIONS = ("off", "ngram", "mtp")

MAX_SPECULATIVE_TOKENS = 16
"""More than that in a row are hardly ever accepted."""

DTYPES = ("auto", "float32", "bf16", "w8a16", "w8a8g64", "int8", "int4")

KV_CACHE_DTYPES = ("auto", "float32", "bf16", "int8")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which weights, in which precision, on how many threads."""

    dtype: str = option(
        "auto",
        "Weights: auto (bf16), float32, bf16, int8 (W8A8), int4 (W4A8); or one format for all: "
        "w8a16, w8a8g64 (int8 weights).",
    )
    kv_cache_dtype: str = option(
        "auto",
        "KV cache: auto (bf16; float32 with float32 weights), float32, bf16, or int8 (half of "
        "bf16's memory; not for latent attention).",
    )
    backend: str = option("cpu", "Operator backend: cpu (native) or reference (NumPy, slow).")
    num_threads: int = option(0, "Operator threads; 0 = one per available core.")

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        _require(
            self.kv_cache_dtype in KV_CACHE_DTYPES,
            f"kv_cache_dtype={self.kv_cache_dtype!r} must be one of {', '.join(KV_CACHE_DTYPES)}",
        )
        _require(
            self.backend in ("cpu", "reference"),
            f"backend={self.backend!r} must be cpu or reference",
        )
        _require(
            0 <= self.num_threads <= MAX_THREADS,
            f"num_threads={self.num_threads} must be between 0 and {MAX_THREADS}",
        )

    @property
    def weight_dtype(self) -> str:
        """`dtype` with auto resolved."""
        return "bf16" if self.dtype == "auto" else self.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Limits of one DP group: scheduler budgets and the KV pool."""

    max_num_seqs: int = option(64, "Most sequences computed in one step.")
    max_num_batched_tokens: int = option(512, "Most tokens computed in one step (chunked prefill).")
    max_model_len: int = option(0, "Longest prompt + output; 0 = what the model supports.")
    max_num_waiting: int = option(1024, "Longest waiting queue; beyond it requests get a 503.")
    block_size: int = option(16, "Tokens per KV block.")
    kv_cache_bytes: int = option(1 << 30, "Bytes of KV cache; decides the number of blocks.")
    num_kv_blocks: int = option(0, "Number of KV blocks; 0 = from kv_cache_bytes.")
    prefix_caching: bool = option(True, "Reuse KV of equal prompt prefixes of one cache salt.")
    num_microbatches: int = option(
        0, "Parts of a step under way at once, to overlap workers; 0 = by measured times."
    )

    share_experts: bool = option(
        True, "Compute some experts while expert workers would be waited for, by measured waits."
    )
    speculation: str = option(
        "off",
        "Drafts checked where it pays: off, ngram (from repetitions) or mtp (by the model).",
    )
    num_speculative_tokens: int = option(4, "Most drafts of a request in one step.")

    def __post_init__(self) -> None:
        _require_positive(
            self, "max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "block_size",
            "kv_cache_bytes",
        )  # fmt: skip
        _require(self.max_model_len >= 0, f"max_model_len={self.max_model_len} must be >= 0")
        _require(
            0 <= self.num_microbatches <= MAX_MICROBATCHES,
            f"num_microbatches={self.num_microbatches} must be between 0 and {MAX_MICROBATCHES}",
        )
        _require(self.num_kv_blocks >= 0, f"num_kv_blocks={self.num_kv_blocks} must be >= 0")
        _require(
            self.speculation in SPECULATIONS,
            f"speculation={self.speculation!r} must be one of {', '.join(SPECULATIONS)}",
        )
        _require(
            1 <= self.num_speculative_tokens <= MAX_SPECULATIVE_TOKENS,
            f"num_speculative_tokens={self.num_speculative_tokens} must be between 1 and "
            f"{MAX_SPECULATIVE_TOKENS}",
        )
        _require(
            self.max_num_batched_tokens >= self.max_num_seqs,
            f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
            f"max_num_seqs={self.max_num_seqs}, or decoding sequences starve",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """The HTTP edge: where it listens and what it refuses."""

    host: str = option("127.0.0.1", "Address to listen on.")
    port: int = option(8000, "Port to listen on; 0 = any free one (printed).")
    allowed_hosts: str = option(
        "", "Names besides localhost that requests may call this machine by, with commas between."
    )
    admin_host: str = option("127.0.0.1", "Address of the admin API.")
    admin_port: int = option(0, "Port of the admin API, which needs a key of its own; 0 = none.")
    prices: str = option("", "Price table (YAML); without one tokens are counted and cost nothing.")
    max_body_bytes: int = option(10 << 20, "Largest request body.")
    max_messages: int = option(2048, "Most chat messages in a request.")
    max_n: int = option(8, "Most choices (n) per prompt.")
    max_prompts: int = option(128, "Most prompts in one completions request.")
    max_stop: int = option(16, "Most stop strings and most stop token ids.")
    max_stop_length: int = option(256, "Longest stop string, in characters.")
    max_logit_bias: int = option(300, "Most logit_bias entries.")
    default_max_tokens: int = option(0, "Output limit when a request names none; 0 = context.")
    drain_timeout_s: float = option(30.0, "Seconds that running requests get after SIGTERM.")

    def __post_init__(self) -> None:
        _require_positive(
            self, "max_body_bytes", "max_messages", "max_n", "max_prompts", "max_stop",
            "max_stop_length", "max_logit_bias",
        )  # fmt: skip
        for name in ("port", "admin_port"):
            port = getattr(self, name)
            _require(0 <= port <= 65535, f"{name}={port} must be between 0 and 65535")
        _require(self.drain_timeout_s >= 0, f"drain_timeout_s={self.drain_timeout_s} must be >= 0")
        _require(self.default_max_tokens >= 0, "default_max_tokens must be >= 0")

    @property
    def host_names(self) -> list[str]:
        """`allowed_hosts`, and the name it listens on."""
        return [self.host, *self.allowed_hosts.split(",")]


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """Service-level objectives: `xds status` shows them, `/metrics` who kept them."""

    ttft_ms: float = option(0.0, "Target time to first token, milliseconds; 0 = none.")
    tpot_ms: float = option(50.0, "Target time per output token, milliseconds; 0 = none.")

    def __post_init__(self) -> None:
        for name, value in (("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms)):
            _require(math.isfinite(value) and value >= 0, f"{name}={value} must be finite and >= 0")
