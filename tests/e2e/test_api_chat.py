"""/v1/chat/completions as the official SDK sees it, over a replaying engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.api_harness import MODEL, make_app, plain_client, sdk_client
from tests.unit.maas.asgi import open_app
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.config import GatewayConfig
from xdeepserve.errors import ConfigError, ModelFormatError
from xdeepserve.maas.app import create_app
from xdeepserve.messages import FinishReason
from xdeepserve.text.generation_config import SamplingDefaults

ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
RENDERED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


async def test_chat_completion() -> None:
    engine = ReplayEngine(steps_of("Bonjour 🎉"), num_cached_tokens=4)
    async with sdk_client(make_app(engine)) as client:
        reply = await client.chat.completions.create(**ASK)
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "Bonjour 🎉")
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert (reply.model, reply.service_tier) == (MODEL, "default")
    assert reply.system_fingerprint is not None
    tokenizer = byte_tokenizer()
    prompt_ids = engine.requests[0].prompt_token_ids
    assert tokenizer.decode(prompt_ids, skip_special_tokens=False) == RENDERED
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt_ids)
    assert reply.usage.completion_tokens == len("Bonjour 🎉".encode()) + 1
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 4


async def test_stream_has_role_text_finish_and_usage() -> None:
    engine = ReplayEngine(steps_of("one 🎉 two", step=1))
    async with sdk_client(make_app(engine)) as client:
        stream = await client.chat.completions.create(
            **ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    first, last, usage = chunks[0], chunks[-2], chunks[-1]
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert last.choices[0].delta.model_dump(exclude_unset=True) == {}
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "one 🎉 two"
    assert all("�" not in (c.choices[0].delta.content or "") for c in chunks if c.choices)


async def test_usage_is_null_on_other_chunks_only_when_asked_for() -> None:
    async with plain_client(make_app(ReplayEngine(steps_of("x")))) as client:
        plain = await client.post("/v1/chat/completions", json={**ASK, "stream": True})
        asked = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
        with_usage = await client.post("/v1/chat/completions", json=asked)
    assert '"usage"' not in plain.text
    assert '"usage":null' in with_usage.text
    assert plain.text.endswith("data: [DONE]\n\n")
    assert with_usage.text.endswith("data: [DONE]\n\n")
    assert plain.headers["content-type"].startswith("text/event-stream")


async def test_two_choices_stream_and_whole() -> None:
    engine = ReplayEngine(steps_of("first"), steps_of("second"), steps_of("first"), steps_of("2nd"))
    async with sdk_client(make_app(engine)) as client:
        whole = await client.chat.completions.create(**ASK, n=2, seed=3)
        stream = await client.chat.completions.create(**ASK, n=2, seed=3, stream=True)
        streamed = {0: "", 1: ""}
        roles = []
        async for chunk in stream:
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
                roles += [choice.index] if choice.delta.role else []
    assert [choice.message.content for choice in whole.choices] == ["first", "second"]
    assert streamed == {0: "first", 1: "2nd"}
    assert sorted(roles) == [0, 1]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert whole.usage.completion_tokens == len("first") + len("second") + 2
    seeds = [request.params.seed for request in engine.requests]
    assert seeds[0] == seeds[2] == 3
    assert seeds[1] == seeds[3] != 3


async def test_logprobs() -> None:
    engine = ReplayEngine(steps_of("é", logprobs=True))
    async with sdk_client(make_app(engine)) as client:
        reply = await client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
    assert engine.requests[0].params.logprobs == 2
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.bytes for entry in logprobs.content] == [[0xC3], [0xA9]]
    assert [entry.token for entry in logprobs.content] == ["�", "�"]
    assert logprobs.content[0].logprob == -0.25
    assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.25, -9999.0]


async def test_streamed_logprobs_add_up() -> None:
    engine = ReplayEngine(steps_of("abc", step=1, logprobs=True))
    async with sdk_client(make_app(engine)) as client:
        stream = await client.chat.completions.create(**ASK, logprobs=True, stream=True)
        tokens = [
            entry.token
            async for chunk in stream
            if chunk.choices[0].logprobs
            for entry in chunk.choices[0].logprobs.content or []
        ]
    assert tokens == ["a", "b", "c"]


async def test_stop_string_and_length() -> None:
    engine = ReplayEngine(steps_of("one<|two", step=2), steps_of("cut", finish=FinishReason.LENGTH))
    async with sdk_client(make_app(engine)) as client:
        stopped = await client.chat.completions.create(**ASK, stop=["<|"])
        cut = await client.chat.completions.create(**ASK, max_tokens=3)
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("one", "stop")
    assert cut.choices[0].finish_reason == "length"
    assert engine.requests[1].params.max_tokens == 3


async def test_fields_reach_the_engine() -> None:
    engine = ReplayEngine(steps_of("x"))
    async with sdk_client(make_app(engine)) as client:
        await client.chat.completions.create(
            **ASK,
            max_completion_tokens=9,
            temperature=0.5,
            top_p=0.9,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={"65": 5},
            user="someone",
            metadata={"k": "v"},
            service_tier="auto",
            tools=[],
            tool_choice="none",
            response_format={"type": "text"},
            extra_body={
                "top_k": 5,
                "min_p": 0.05,
                "min_tokens": 2,
                "ignore_eos": True,
                "stop_token_ids": [10],
                "repetition_penalty": 1.2,
                "some_future_field": {"a": [1]},
            },
        )
    params = engine.requests[0].params
    assert (params.max_tokens, params.min_tokens, params.top_k) == (9, 2, 5)
    assert (params.temperature, params.top_p, params.min_p) == (0.5, 0.9, 0.05)
    assert params.logit_bias == {65: 5.0}
    assert params.stop_token_ids == (10,)
    assert params.ignore_eos


async def test_output_is_clipped_to_the_context() -> None:
    engine = ReplayEngine(steps_of("x"))
    async with sdk_client(make_app(engine)) as client:
        await client.chat.completions.create(**ASK)
        await client.chat.completions.create(**ASK, max_tokens=engine.info.max_model_len)
    for request in engine.requests:
        room = engine.info.max_model_len - len(request.prompt_token_ids)
        assert request.params.max_tokens == room


async def test_default_output_limit() -> None:
    engine = ReplayEngine(steps_of("x"))
    async with sdk_client(make_app(engine, config=GatewayConfig(default_max_tokens=5))) as client:
        await client.chat.completions.create(**ASK)
    assert engine.requests[0].params.max_tokens == 5


async def test_roles_parts_and_continuation() -> None:
    engine = ReplayEngine(steps_of("x"))
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
        {"role": "assistant", "content": "The answer"},
    ]
    async with plain_client(make_app(engine)) as client:
        reply = await client.post(
            "/v1/chat/completions",
            json={"model": MODEL, "messages": messages, "continue_final_message": True},
        )
    assert reply.status_code == 200
    text = byte_tokenizer().decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\nThe answer"
    )


async def test_sdk_errors_are_typed() -> None:
    engine = ReplayEngine(steps_of("x"))
    async with sdk_client(make_app(engine)) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(**{**ASK, "model": "nope"})
        long = [{"role": "user", "content": "word " * 400}]
        with pytest.raises(openai.BadRequestError) as too_long:
            await client.chat.completions.create(**{**ASK, "messages": long})
    assert missing.value.code == "model_not_found"
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "messages")
    num_tokens = len(byte_tokenizer().encode(RENDERED.replace("hi", "word " * 400)))
    assert f"{num_tokens} tokens" in too_long.value.message
    assert str(engine.info.max_model_len) in too_long.value.message
    assert engine.requests == []


async def test_error_in_mid_stream_reaches_the_sdk() -> None:
    engine = ReplayEngine(steps_of("abcdef", step=1)[:3])
    async with sdk_client(make_app(engine)) as client:
        stream = await client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.APIError, match="without a finish reason"):
            async for _ in stream:
                pass


async def test_model_without_a_chat_template() -> None:
    app = open_app(ReplayEngine(steps_of("x")))
    async with sdk_client(app) as client:
        with pytest.raises(openai.BadRequestError, match="/v1/completions") as caught:
            await client.chat.completions.create(**ASK)
    assert caught.value.code == "no_chat_template"


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ 'a' * 10000000000 }}",
        "{{ raise_exception('only one user') }}",
        "{{ 1 / 0 }}",
    ],
)
async def test_hostile_template_harms_only_its_request(template: str) -> None:
    engine = ReplayEngine(steps_of("x"))
    tokenizer = byte_tokenizer(chat_template=template)
    app = create_app(engine, tokenizer, GatewayConfig(), model_names=[MODEL])
    async with sdk_client(app) as client:
        with pytest.raises(openai.BadRequestError, match="chat template") as caught:
            await client.chat.completions.create(**ASK)
        good = await client.completions.create(model=MODEL, prompt="hi")
    assert caught.value.param == "messages"
    assert good.choices[0].text == "x"


def test_template_that_does_not_compile_stops_the_start() -> None:
    tokenizer = byte_tokenizer(chat_template="{% if %}")
    with pytest.raises(ModelFormatError, match="chat template"):
        create_app(ReplayEngine(), tokenizer, GatewayConfig(), model_names=[MODEL])


def test_no_served_name_stops_the_start() -> None:
    with pytest.raises(ConfigError, match="model_names"):
        make_app(ReplayEngine(), model_names=[])


async def test_the_models_own_sampling_defaults_reach_the_engine() -> None:
    engine = ReplayEngine(steps_of("x"))
    defaults = SamplingDefaults(temperature=0.2, top_p=0.9)
    app = create_app(
        engine, byte_tokenizer(), GatewayConfig(), model_names=[MODEL], defaults=defaults
    )
    async with sdk_client(app) as client:
        await client.chat.completions.create(**ASK, top_p=0.5)
    params = engine.requests[0].params
    assert (params.temperature, params.top_p) == (0.2, 0.5)


async def test_choices_of_one_conversation_are_bounded() -> None:
    async with plain_client(make_app(ReplayEngine(), config=GatewayConfig(max_n=300))) as client:
        reply = await client.post("/v1/chat/completions", json={**ASK, "n": 257})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")
