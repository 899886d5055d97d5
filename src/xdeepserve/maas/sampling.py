"""Request fields -> SamplingParams: every range and combination is checked here, once.

The engine trusts what comes out.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TypeVar

from xdeepserve.config import GatewayConfig
from xdeepserve.errors import RequestError
from xdeepserve.maas.schema import SERVICE_TIER, GenerationFields
from xdeepserve.messages import MAX_TOP_LOGPROBS, EngineInfo, SamplingParams
from xdeepserve.text.generation_config import SamplingDefaults

N = TypeVar("N", int, float)

_SEED_MASK = (1 << 64) - 1
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 10.0),
)
_UNSUPPORTED = (
    "prompt_logprobs", "structured_outputs", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "tools", "functions", "audio", "suffix",
)  # fmt: skip
MAX_LOGIT_BIAS = 100.0

MAX_SALT_LENGTH = 256
MAX_SEQUENCES = 256
"""Most prompts times choices of one request; a quarter of the default waiting queue."""


def sampling_params(
    fields: GenerationFields,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    info: EngineInfo,
    config: GatewayConfig,
    defaults: SamplingDefaults,
) -> SamplingParams:
    """Checked parameters of choice 0; `max_tokens` is not yet clipped to a prompt.

    Args:
        max_tokens: what the request asks for under either of its names, or None.
        logprobs: alternatives per token, or None for no logprobs.
        defaults: the model's own, for fields that the request leaves out.

    Raises:
        RequestError: a value is out of range or a feature is not supported; `param` names it.
    """
    _check_supported(fields)
    for name, low, high in _RANGES:
        _check_range(name, getattr(fields, name), low, high)
    if fields.top_p == 0:
        raise RequestError("top_p=0 must be greater than 0", param="top_p")
    _check_range("top_k", fields.top_k, -1, info.vocab_size)
    _check_range("logprobs", logprobs, 0, MAX_TOP_LOGPROBS)
    _check_range("n", fields.n, 1, config.max_n)
    limit = _max_tokens(max_tokens, info, config)
    _check_range("min_tokens", fields.min_tokens, 0, limit)
    return SamplingParams(
        max_tokens=limit,
        min_tokens=fields.min_tokens or 0,
        temperature=_first(fields.temperature, defaults.temperature, 1.0),
        top_k=max(0, _first(fields.top_k, defaults.top_k, 0)),
        top_p=_first(fields.top_p, defaults.top_p, 1.0),
        min_p=_first(fields.min_p, defaults.min_p, 0.0),
        seed=secrets.randbits(64) if fields.seed is None else fields.seed & _SEED_MASK,
        repetition_penalty=_first(fields.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=_logit_bias(fields.logit_bias or {}, info, config),
        stop_token_ids=_stop_token_ids(fields.stop_token_ids or [], info, config),
        ignore_eos=fields.ignore_eos,
        logprobs=logprobs,
    )


def choice_seed(seed: int, index: int) -> int:
    """Seed of the index-th choice: the request's own for 0, a hash of (seed, index) after that."""
    if index == 0:
        return seed
    key = seed.to_bytes(8, "little") + index.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def cache_salt(salt: str | None) -> str:
    """The request's own prefix-cache salt; without one, prefixes are shared by all who name none.

    Raises:
        RequestError: empty or too long.
    """
    if salt is None:
        return ""
    if not 1 <= len(salt) <= MAX_SALT_LENGTH:
        raise RequestError(
            f"cache_salt has {len(salt)} characters; between 1 and {MAX_SALT_LENGTH} are allowed",
            param="cache_salt",
        )
    return salt


def check_num_sequences(num_prompts: int, num_choices: int) -> None:
    """Keep one request from filling the engine's queue.

    Raises:
        RequestError: too many prompts times choices.
    """
    if num_prompts * num_choices > MAX_SEQUENCES:
        raise RequestError(
            f"{num_prompts} prompts with n={num_choices} are {num_prompts * num_choices} "
            f"sequences; the limit is {MAX_SEQUENCES}; send several requests",
            param="n",
        )


def stop_list(stop: str | list[str] | None, config: GatewayConfig) -> tuple[str, ...]:
    """Checked stop strings.

    Raises:
        RequestError: too many, too long or empty.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > config.max_stop:
        message = f"stop has {len(stops)} strings; the limit is {config.max_stop}"
        raise RequestError(message, param="stop")
    for text in stops:
        if not text:
            raise RequestError("stop must not contain an empty string", param="stop")
        if len(text) > config.max_stop_length:
            raise RequestError(
                f"a stop string has {len(text)} characters; the limit is {config.max_stop_length}",
                param="stop",
            )
    return stops


def _first(asked: N | None, recommended: N | None, plain: N) -> N:
    if asked is not None:
        return asked
    return plain if recommended is None else recommended


def _check_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise RequestError(
            f"{name}={_show(value)} must be between {_show(low)} and {_show(high)}", param=name
        )


def _show(value: float) -> str:
    if abs(value) >= 1e18:
        return "(too large to show)"
    return str(int(value) if value == int(value) else value)


def _check_supported(fields: GenerationFields) -> None:
    for name in _UNSUPPORTED:
        if getattr(fields, name, None):
            raise RequestError(f"{name} is not supported", param=name, code="unsupported")
    if fields.response_format is not None and fields.response_format.type != "text":
        raise RequestError(
            f"response_format type {fields.response_format.type!r} is not supported; use 'text'",
            param="response_format",
            code="unsupported",
        )
    if fields.service_tier not in (None, "auto", SERVICE_TIER):
        raise RequestError(
            f"service_tier={fields.service_tier!r} must be 'auto' or {SERVICE_TIER!r}",
            param="service_tier",
        )
    if fields.best_of not in (None, fields.n or 1):
        raise RequestError("best_of must equal n", param="best_of", code="unsupported")
    if fields.stream_options is not None and not fields.stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")


def _max_tokens(asked: int | None, info: EngineInfo, config: GatewayConfig) -> int:
    _check_range("max_tokens", asked, 1, info.max_model_len)
    return asked or min(config.default_max_tokens, info.max_model_len) or info.max_model_len


def _check_token_id(name: str, token_id: int, info: EngineInfo) -> None:
    if not 0 <= token_id < info.vocab_size:
        raise RequestError(
            f"{name}: token id {_show(token_id)} must be between 0 and {info.vocab_size - 1}",
            param=name,
        )


def check_token_ids(name: str, token_ids: list[int], info: EngineInfo) -> None:
    """Refuse ids outside the vocabulary.

    Raises:
        RequestError: naming the first offender.
    """
    if token_ids and (min(token_ids) < 0 or max(token_ids) >= info.vocab_size):
        for token_id in token_ids:
            _check_token_id(name, token_id, info)


def _stop_token_ids(ids: list[int], info: EngineInfo, config: GatewayConfig) -> tuple[int, ...]:
    if len(ids) > config.max_stop:
        raise RequestError(
            f"stop_token_ids has {len(ids)} ids; the limit is {config.max_stop}",
            param="stop_token_ids",
        )
    check_token_ids("stop_token_ids", ids, info)
    return tuple(ids)


def _logit_bias(
    bias: dict[str, float], info: EngineInfo, config: GatewayConfig
) -> dict[int, float]:
    if len(bias) > config.max_logit_bias:
        raise RequestError(
            f"logit_bias has {len(bias)} entries; the limit is {config.max_logit_bias}",
            param="logit_bias",
        )
    parsed: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise RequestError(f"logit_bias key {key[:40]!r} is not a token id", param="logit_bias")
        _check_token_id("logit_bias", int(key), info)
        _check_range("logit_bias", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        parsed[int(key)] = float(value)
    return parsed
