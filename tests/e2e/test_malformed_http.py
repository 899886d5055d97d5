"""Malformed requests: each gets a clear 4xx, and the server answers the next good one."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from tests.e2e.api_harness import MODEL, make_app, plain_client
from tests.unit.maas.replay_engine import INFO, ReplayEngine, steps_of
from xdeepserve.config import GatewayConfig

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
CONFIG = GatewayConfig(max_body_bytes=200_000, max_messages=16, max_prompts=4, max_stop=4)


@dataclass(frozen=True)
class Row:
    """One bad request: where it goes, what it holds, what the answer must say."""

    name: str
    path: str
    body: bytes
    says: str
    status: int = 400
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


def _chat(name: str, says: str, *, code: str | None = None, **fields: Any) -> Row:
    body = {"model": MODEL, "messages": HELLO, **fields}
    return Row(name, CHAT, json.dumps(body).encode(), says, code=code)


def _text(name: str, says: str, *, code: str | None = None, **fields: Any) -> Row:
    body = {"model": MODEL, "prompt": "hi", **fields}
    return Row(name, TEXT, json.dumps(body).encode(), says, code=code)


def _raw(name: str, body: bytes, says: str = "JSON", path: str = CHAT) -> Row:
    return Row(name, path, body, says)


def _message(name: str, message: Any, says: str) -> Row:
    return _chat(name, says, messages=[message])


def _inside(value: bytes) -> bytes:
    """A chat body whose temperature is the given raw JSON."""
    head = b'{"model":"toy","messages":[{"role":"user","content":"hi"}],"temperature":'
    return head + value + b"}"


ROWS = [
    _raw("empty body", b""),
    _raw("JSON cut short", b'{"model": "toy", "mess'),
    _raw("trailing garbage", _inside(b"1") + b" x"),
    _raw("not JSON", b"model=toy&prompt=hi"),
    _raw("not UTF-8", b'{"model": "\xff\xfe"}', "UTF-8"),
    _raw("UTF-16", '{"model": "toy"}'.encode("utf-16")),
    _raw("byte order mark", b"\xef\xbb\xbf{}"),
    _raw("NUL bytes", b"\0\0\0\0"),
    _raw("array at the top", b"[]", "object"),
    _raw("string at the top", b'"hi"', "object"),
    _raw("null at the top", b"null", "object"),
    _raw("NaN", _inside(b"NaN")),
    _raw("Infinity", _inside(b"Infinity")),
    _raw("minus Infinity", _inside(b"-Infinity")),
    _raw("number beyond float", _inside(b"1e999"), "temperature"),
    _raw("number of 5000 digits", _inside(b"9" * 5000), "temperature"),
    _raw("lone surrogate", b'{"model":"toy","prompt":"\\ud800"}', "surrogate", TEXT),
    _raw("reversed surrogates", b'{"model":"toy","prompt":"\\ude00\\ud83d"}', "surrogate", TEXT),
    _raw("lone surrogate in a stop", b'{"model":"toy","prompt":"a","stop":"\\udfff"}', "surrogate",
         TEXT),
    _raw("pair cut in two", b'{"model":"toy","prompt":"\\ud83dxxxxxxx"}', "surrogate", TEXT),
    _raw("surrogates and a cut", b'{"model":"toy","prompt":"\\ud83d\\ude00', "truncated", TEXT),
    _raw("deep nesting", b'{"model":"toy","x":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested"),
    _raw("deep nesting cut short", b"[" * 100_000, "object"),
    _raw("no model", b'{"messages": []}', "model"),
    _raw("no messages", b'{"model": "toy"}', "messages"),
    _raw("no prompt", b'{"model": "toy"}', "prompt", TEXT),
    Row("unknown model", TEXT, b'{"model":"x","prompt":"a"}', "'x'", 404, "model_not_found"),
    Row("empty model", TEXT, b'{"model":"","prompt":"a"}', "''", 404, "model_not_found"),
    Row("huge model name", TEXT, json.dumps({"model": "x" * 9999, "prompt": ""}).encode(), "x",
        404, "model_not_found"),
    Row("body too large", TEXT, b"x" * 200_001, "200000", 413, "request_too_large"),
    Row("lying content-length", TEXT, b"{}", "200000", 413, headers={"content-length": "9" * 12}),
    _chat("model is a number", "model", model=5),
    _chat("no messages in the list", "messages", messages=[]),
    _chat("too many messages", "16", messages=HELLO * 17),
    _chat("messages is a string", "messages", messages="hi"),
    _chat("messages is an object", "messages", messages={"role": "user"}),
    _message("message is a string", "hi", "messages[0]"),
    _message("no role", {"content": "hi"}, "role"),
    _message("unknown role", {"role": "root", "content": "hi"}, "root"),
    _message("role is null", {"role": None, "content": "hi"}, "role"),
    _message("no content", {"role": "user"}, "content"),
    _message("content is a number", {"role": "user", "content": 5}, "content"),
    _message("content is an object", {"role": "user", "content": {}}, "content"),
    _message("image part", {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
             "image_url"),
    _message("text part without text", {"role": "user", "content": [{"type": "text"}]}, "text"),
    _message("tool calls", {"role": "assistant", "content": "a", "tool_calls": [{}]}, "tool_calls"),
    _chat("over-long prompt", str(INFO.max_model_len), code="context_length_exceeded",
          messages=[{"role": "user", "content": "word " * 2000}]),
    _chat("bool where int", "max_tokens", max_tokens=True),
    _chat("float where int", "max_tokens", max_tokens=1.5),
    _chat("string where int", "max_tokens", max_tokens="10"),
    _chat("zero max_tokens", "max_tokens", max_tokens=0),
    _chat("negative max_tokens", "max_tokens", max_tokens=-1),
    _chat("1e9 max_tokens", "max_tokens", max_tokens=10**9),
    _chat("1e9 n", "n=1000000000", n=10**9),
    _chat("zero n", "n=0", n=0),
    _chat("huge max_tokens", "max_tokens", max_tokens=10**40),
    _chat("1e9 temperature", "temperature", temperature=1e9),
    _chat("temperature is a string", "temperature", temperature="hot"),
    _chat("top_p beyond one", "top_p", top_p=1.5),
    _chat("top_k of 1e9", "top_k", top_k=10**9),
    _chat("21 top_logprobs", "21", logprobs=True, top_logprobs=21),
    _chat("top_logprobs alone", "logprobs", top_logprobs=2),
    _chat("logprobs is a number", "logprobs", logprobs=3),
    _chat("seed is a float", "seed", seed=0.5),
    _chat("stop is a number", "stop", stop=5),
    _chat("empty stop", "stop", stop=[""]),
    _chat("five stops", "stop", stop=["a", "b", "c", "d", "e"]),
    _chat("long stop", "256", stop="x" * 257),
    _chat("stop of nested lists", "stop", stop=[["a"]]),
    _chat("stop_token_ids out of range", "stop_token_ids", stop_token_ids=[10**9]),
    _chat("logit_bias by word", "logit_bias", logit_bias={"hello": 1}),
    _chat("logit_bias out of range", "logit_bias", logit_bias={"1": 1e9}),
    _chat("logit_bias is a list", "logit_bias", logit_bias=[1]),
    _chat("stream is a string", "stream", stream="yes"),
    _chat("stream_options without stream", "stream", stream_options={"include_usage": True}),
    _chat("tools", "tools", code="unsupported", tools=[{"type": "function"}]),
    _chat("forced tool", "tool_choice", code="unsupported", tool_choice="required"),
    _chat("JSON mode", "json_object", code="unsupported", response_format={"type": "json_object"}),
    _chat("audio", "modalities", code="unsupported", modalities=["audio"]),
    _chat("tier not offered", "service_tier", service_tier="priority"),
    _chat("nothing to continue", "continue_final_message", continue_final_message=True),
    _text("prompt is null", "prompt", prompt=None),
    _text("prompt is a number", "prompt", prompt=5),
    _text("empty prompt", "no tokens", prompt=""),
    _text("empty prompt list", "prompt", prompt=[]),
    _text("empty list of ids", "no tokens", prompt=[[]]),
    _text("mixed prompts", "prompt", prompt=["a", 1]),
    _text("five prompts", "4", prompt=["a"] * 5),
    _text("text beyond any tokenization", "at least", prompt="ab " * 3000,
          code="context_length_exceeded"),
    _text("empty cache salt", "cache_salt", prompt="a", cache_salt=""),
    _text("cache salt is a number", "cache_salt", prompt="a", cache_salt=5),
    _text("negative token id", "-1", prompt=[1, -1]),
    _text("token id out of range", str(INFO.vocab_size - 1), prompt=[INFO.vocab_size]),
    _text("1e9 as token id", "1000000000", prompt=[[10**9]]),
    _text("token id of 40 digits", "too large", prompt=[10**40]),
    _text("float token id", "prompt", prompt=[1.5]),
    _text("bool token id", "prompt", prompt=[True]),
    _text("nested too deep", "prompt", prompt=[[[1]]]),
    _text("too many ids", "20000", prompt=[1] * 20000, code="context_length_exceeded"),
    _text("echo with logprobs", "echo", echo=True, logprobs=1),
    _text("suffix", "suffix", suffix="end"),
    _text("best_of", "best_of", best_of=5),
    Row("tokenize nothing", "/tokenize", b"{}", "prompt"),
    Row("tokenize both", "/tokenize", b'{"prompt":"a","messages":[]}', "prompt"),
    Row("tokenize a number", "/tokenize", b'{"prompt":5}', "prompt"),
    Row("detokenize a word", "/detokenize", b'{"tokens":["a"]}', "tokens"),
    Row("detokenize out of range", "/detokenize", b'{"tokens":[1000000000]}', "1000000000"),
    Row("detokenize negative", "/detokenize", b'{"tokens":[-5]}', "-5"),
    Row("wrong path", "/v1/chat", b"{}", "/v1/chat", 404),
    Row("wrong method", "/health", b"{}", "POST", 405),
]  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client() -> AsyncIterator[httpx2.AsyncClient]:
    async with plain_client(make_app(ReplayEngine(steps_of("fine")), config=CONFIG)) as opened:
        yield opened


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_clear_4xx_and_an_unharmed_server(client: httpx2.AsyncClient, row: Row) -> None:
    reply = await client.post(row.path, content=row.body, headers=row.headers)
    assert reply.status_code == row.status
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert row.says in error["message"]
    assert row.code is None or error["code"] == row.code
    assert len(error["message"]) < 600
    good = await client.post(CHAT, content=json.dumps({"model": MODEL, "messages": HELLO}))
    assert good.json()["choices"][0]["message"]["content"] == "fine"
