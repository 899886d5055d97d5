"""Parameters: defaults, ranges, seeds."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.maas.replay_engine import INFO
from xdeepserve.config import GatewayConfig
from xdeepserve.errors import RequestError
from xdeepserve.maas.sampling import (
    cache_salt,
    check_num_sequences,
    choice_seed,
    sampling_params,
    stop_list,
)
from xdeepserve.maas.schema import GenerationFields, ResponseFormat, StreamOptions
from xdeepserve.messages import SamplingParams
from xdeepserve.text.generation_config import SamplingDefaults

CONFIG = GatewayConfig(max_n=4, max_stop=2, max_stop_length=5, max_logit_bias=2)


def _params(
    *, max_tokens: int | None = None, logprobs: int | None = None, **fields: Any
) -> SamplingParams:
    return sampling_params(
        GenerationFields(model="m", **fields),
        max_tokens=max_tokens,
        logprobs=logprobs,
        info=INFO,
        config=CONFIG,
        defaults=SamplingDefaults(),
    )


def test_defaults() -> None:
    params = _params(seed=5)
    assert params == SamplingParams(max_tokens=INFO.max_model_len, seed=5)


def test_default_output_limit_comes_from_the_config() -> None:
    config = GatewayConfig(default_max_tokens=9)
    fields = GenerationFields(model="m")
    params = sampling_params(
        fields,
        max_tokens=None,
        logprobs=None,
        info=INFO,
        config=config,
        defaults=SamplingDefaults(),
    )
    assert params.max_tokens == 9


def test_every_field_arrives() -> None:
    params = _params(
        max_tokens=7,
        logprobs=3,
        min_tokens=2,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        seed=2**64 + 3,
        stop_token_ids=[1, 2],
        ignore_eos=True,
        repetition_penalty=1.1,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={"5": -100},
    )
    assert params == SamplingParams(
        max_tokens=7,
        logprobs=3,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=0,
        min_p=0.1,
        seed=3,
        stop_token_ids=(1, 2),
        ignore_eos=True,
        repetition_penalty=1.1,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias={5: -100.0},
    )


def test_absent_seeds_differ_and_choices_derive_from_the_seed() -> None:
    assert _params().seed != _params().seed
    seeds = [choice_seed(11, i) for i in range(8)]
    assert seeds[0] == 11
    assert len(set(seeds)) == 8
    assert seeds == [choice_seed(11, i) for i in range(8)]
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.01}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 10**9}, "top_k"),
        ({"min_p": -1.0}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"9999": 1.0}}, "logit_bias"),
        ({"logit_bias": {"9" * 99: 1.0}}, "logit_bias"),
        ({"logit_bias": {"1": 101.0}}, "logit_bias"),
        ({"logit_bias": {"1": 1.0, "2": 1.0, "3": 1.0}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"),
        ({"stop_token_ids": [1, 2, 3]}, "stop_token_ids"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"best_of": 3}, "best_of"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"response_format": ResponseFormat("json_object")}, "response_format"),
        ({"stream_options": StreamOptions()}, "stream_options"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        _params(**fields)
    assert caught.value.param == param
    assert param in caught.value.message


@pytest.mark.parametrize("stop", ["", ["a", ""], ["a", "b", "c"], "toolong"])
def test_bad_stop_strings(stop: str | list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        stop_list(stop, CONFIG)
    assert caught.value.param == "stop"


def test_stop_as_string_list_or_nothing() -> None:
    assert [stop_list(s, CONFIG) for s in ("a", ["a", "b"], [], None)] == [
        ("a",),
        ("a", "b"),
        (),
        (),
    ]


def test_cache_salt_is_bounded() -> None:
    assert [cache_salt(salt) for salt in (None, "a", "é" * 256)] == ["", "a", "é" * 256]
    for salt in ("", "a" * 257):
        with pytest.raises(RequestError, match="256"):
            cache_salt(salt)


def test_one_request_cannot_fill_the_queue() -> None:
    check_num_sequences(32, 8)
    with pytest.raises(RequestError, match="256"):
        check_num_sequences(128, 8)


def test_the_models_own_defaults_fill_what_is_left_out() -> None:
    defaults = SamplingDefaults(temperature=0.2, top_p=0.9, top_k=40, repetition_penalty=1.1)
    limits = {"max_tokens": 5, "logprobs": None, "info": INFO, "config": CONFIG}
    silent = sampling_params(GenerationFields(model="m"), defaults=defaults, **limits)
    assert (silent.temperature, silent.top_p, silent.top_k) == (0.2, 0.9, 40)
    assert (silent.repetition_penalty, silent.min_p) == (1.1, 0.0)
    fields = GenerationFields(model="m", temperature=0, top_k=0, top_p=1.0)
    asked = sampling_params(fields, defaults=defaults, **limits)
    assert (asked.temperature, asked.top_p, asked.top_k) == (0, 1.0, 0)
