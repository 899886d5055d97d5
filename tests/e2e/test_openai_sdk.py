"""What the official SDK sends and expects, against the real model on a real server."""

from __future__ import annotations

import json
import signal
import time
import urllib.request

import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import MODEL
from xdeepserve.launch.server_process import ServerProcess

pytestmark = [pytest.mark.weights, pytest.mark.slow]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def _metric(server: ServerProcess, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    for line in text.splitlines():
        if line.startswith((name + " ", name + "{")):
            return float(line.rsplit(" ", 1)[1])
    raise AssertionError(f"{name} is not exported:\n{text}")


def _wait_for(server: ServerProcess, name: str, value: float, deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while _metric(server, name) != value:
        assert time.monotonic() < end, f"{name} never became {value}"
        time.sleep(0.02)


def test_models_lists_the_served_name(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_chat_answers_paris(client: OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    choice = reply.choices[0]
    assert "Paris" in (choice.message.content or "")
    assert choice.finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_stream_equals_non_stream_and_ends_with_usage(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    finishes = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert finishes[-1] == "stop"
    assert set(finishes[:-1]) == {None}


def test_repeated_prompt_reports_cached_tokens(client: OpenAI) -> None:
    prompt = "The quick brown fox jumps over the lazy dog. " * 20
    first = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
    second = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert 0 < cached < second.usage.prompt_tokens
    assert first.choices[0].text == second.choices[0].text


def test_n_choices_are_distinct_and_reproducible(client: OpenAI) -> None:
    def ask() -> list[str | None]:
        reply = client.chat.completions.create(
            model=MODEL, messages=QUESTION, n=2, seed=7, temperature=1.5, max_tokens=24
        )
        assert [choice.index for choice in reply.choices] == [0, 1]
        return [choice.message.content for choice in reply.choices]

    texts = ask()
    assert texts[0] != texts[1]
    assert ask() == texts


def test_seed_changes_the_text(client: OpenAI) -> None:
    def ask(seed: int) -> str:
        return (
            client.completions.create(
                model=MODEL, prompt="Once upon a time", seed=seed, temperature=1.2, max_tokens=24
            )
            .choices[0]
            .text
        )

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


def test_chat_logprobs(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_tokens=5,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert reply.usage is not None
    assert len(logprobs.content) == reply.usage.completion_tokens
    for entry in logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert entry.logprob == values[0]
        assert bytes(entry.bytes or []).decode() == entry.token


def test_completion_logprobs_have_offsets(client: OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=4, logprobs=2
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == reply.choices[0].text
    assert logprobs.text_offset is not None
    assert logprobs.text_offset == sorted(logprobs.text_offset)


def test_stop_string_is_not_emitted(client: OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stop=["France"]
    )
    assert "France" not in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"


def test_max_tokens_gives_finish_reason_length(client: OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=3, temperature=0)
    assert reply.choices[0].finish_reason == "length"
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3


def test_completions_takes_lists_of_ids(client: OpenAI) -> None:
    reply = client.completions.create(
        model=MODEL, prompt=[[1, 2, 3], [4, 5, 6, 7]], max_tokens=2, temperature=0
    )
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == 7


@pytest.mark.parametrize(
    ("arguments", "error", "code"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model_not_found"),
        ({"messages": []}, openai.BadRequestError, None),
        ({"temperature": -1}, openai.BadRequestError, None),
        ({"n": 1000}, openai.BadRequestError, None),
        (
            {"messages": [{"role": "user", "content": "word " * 20000}]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
    ],
)
def test_errors_are_typed(
    client: OpenAI, arguments: dict[str, object], error: type[openai.APIStatusError], code: str
) -> None:
    request = {"model": MODEL, "messages": QUESTION, **arguments}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**request)  # type: ignore[call-overload]
    assert caught.value.code == code
    assert caught.value.message


def test_cancelled_stream_frees_the_request(client: OpenAI, server: ServerProcess) -> None:
    stream = client.completions.create(
        model=MODEL,
        prompt="Write a very long story.",
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    _wait_for(server, "xdeepserve:num_requests_running", 1)
    stream.close()
    _wait_for(server, "xdeepserve:num_requests_running", 0)


def test_tokenize_and_detokenize_are_inverse(server: ServerProcess) -> None:
    def post(path: str, body: dict[str, object]) -> dict[str, object]:
        request = urllib.request.Request(
            server.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            answer: dict[str, object] = json.load(reply)
            return answer

    text = "Grüße aus 北京 🎉"
    tokens = post("/tokenize", {"model": MODEL, "prompt": text})["tokens"]
    assert post("/detokenize", {"model": MODEL, "tokens": tokens})["prompt"] == text


def test_sigterm_drains_running_streams() -> None:
    with ServerProcess(MODEL, "--num-kv-blocks", "512") as server:
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(
                model=MODEL,
                prompt="Count:",
                max_tokens=80,
                stream=True,
                temperature=0,
                extra_body={"ignore_eos": True},
                stream_options={"include_usage": True},
            )
            next(iter(stream))
            server.send_signal(signal.SIGTERM)
            chunks = list(stream)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 80
        assert server.wait(30) == 0
