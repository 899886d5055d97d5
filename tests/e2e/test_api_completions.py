"""/v1/completions, /v1/models, /tokenize and /detokenize over a replaying engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.e2e.api_harness import MODEL, make_app, plain_client, sdk_client
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from tests.unit.text.byte_tokenizer import IM_END, byte_tokenizer

ASK: dict[str, Any] = {"model": MODEL, "prompt": "hello"}


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
)
async def test_every_form_of_prompt(prompt: Any, ids: list[list[int]]) -> None:
    engine = ReplayEngine(steps_of("x"))
    async with sdk_client(make_app(engine)) as client:
        reply = await client.completions.create(model=MODEL, prompt=prompt)
    assert [request.prompt_token_ids for request in engine.requests] == ids
    assert [choice.index for choice in reply.choices] == list(range(len(ids)))
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(map(len, ids))


async def test_completion_and_stream_agree() -> None:
    engine = ReplayEngine(steps_of("some text 🎉", step=1))
    async with sdk_client(make_app(engine)) as client:
        whole = await client.completions.create(**ASK)
        stream = await client.completions.create(
            **ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.object == chunks[0].object == "text_completion"
    assert whole.id.startswith("cmpl-")
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


async def test_logprobs_form() -> None:
    engine = ReplayEngine(steps_of("aé", logprobs=True))
    async with sdk_client(make_app(engine)) as client:
        reply = await client.completions.create(**ASK, logprobs=2)
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.text_offset == [0, 1, 1]
    assert logprobs.token_logprobs == [-0.25] * 3
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] == {"a": -0.25, "\0": -9999.0}


@pytest.mark.parametrize("prompt", ["hi <|im_end|>", [104, 105, 32, IM_END]])
@pytest.mark.parametrize("stream", [False, True])
async def test_echo(prompt: Any, stream: bool) -> None:
    engine = ReplayEngine(steps_of(" there", step=1))
    async with plain_client(make_app(engine)) as client:
        body = {"model": MODEL, "prompt": prompt, "echo": True, "n": 2, "stream": stream}
        reply = await client.post("/v1/completions", json=body)
    if stream:
        assert reply.text.count("hi <|im_end|>") == 2
    else:
        texts = [choice["text"] for choice in reply.json()["choices"]]
        assert texts == ["hi <|im_end|> there"] * 2


async def test_long_prompt_is_tokenized_off_the_loop() -> None:
    engine = ReplayEngine(steps_of("x"))
    async with sdk_client(make_app(engine)) as client:
        with pytest.raises(openai.BadRequestError, match="5000 tokens") as caught:
            await client.completions.create(model=MODEL, prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"


async def test_models() -> None:
    engine = ReplayEngine()
    app = make_app(engine, model_names=["toy", "org/alias"])
    async with sdk_client(app) as client:
        names = [model.id async for model in client.models.list()]
        one = await client.models.retrieve("org/alias")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
    assert names == ["toy", "org/alias"]
    assert (one.id, one.object) == ("org/alias", "model")
    assert caught.value.code == "model_not_found"


async def test_tokenize_and_detokenize() -> None:
    text = "Grüße <|im_end|> 🎉"
    async with plain_client(make_app(ReplayEngine())) as client:
        tokens = (await client.post("/tokenize", json={"prompt": text})).json()
        back = await client.post("/detokenize", json={"tokens": tokens["tokens"]})
        chat = await client.post(
            "/tokenize", json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        )
    assert tokens["count"] == len(tokens["tokens"])
    assert tokens["max_model_len"] == 512
    assert back.json() == {"prompt": text}
    assert byte_tokenizer().decode(chat.json()["tokens"], skip_special_tokens=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_cache_salt_reaches_the_engine() -> None:
    engine = ReplayEngine(steps_of("x"))
    async with sdk_client(make_app(engine)) as client:
        await client.completions.create(model=MODEL, prompt="a", extra_body={"cache_salt": "t1"})
    assert engine.requests[0].cache_salt == "t1"
