"""SSE splitting at any border, chunk decoding, and what counts as output."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.loadgen.fake_server import FakeRequest, FakeServer, Reply, text_chunk
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import BrokenResponse
from xdeepserve.loadgen.openai_stream import (
    MAX_EVENT_BYTES,
    Chunk,
    SseSplitter,
    StreamFailed,
    decode_chunk,
    first_model,
    stream_chunks,
)

STREAM = (
    b': ping\n\ndata: {"a":"\xc3\xa9"}\n\nevent: x\ndata: two\r\n\r\ndata:three\n\n'
    b"data: four\ndata: five\n\ndata: [DONE]\n\n"
)
PAYLOADS = [b'{"a":"\xc3\xa9"}', b"two", b"three", b"four\nfive", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_payloads_are_the_same_wherever_reads_end(cuts: list[int]) -> None:
    splitter = SseSplitter()
    borders = [0, *sorted(cuts), len(STREAM)]
    reads = [STREAM[a:b] for a, b in itertools.pairwise(borders)]
    assert [payload for read in reads for payload in splitter.feed(read)] == PAYLOADS


def test_endless_event_is_refused() -> None:
    with pytest.raises(BrokenResponse, match="longer"):
        SseSplitter().feed(b"data: " + b"x" * MAX_EVENT_BYTES)


@pytest.mark.parametrize(
    ("payload", "has_token", "text"),
    [
        (b'{"choices":[{"text":"hi","finish_reason":null}]}', True, "hi"),
        (b'{"choices":[{"text":"","finish_reason":null}]}', True, ""),
        (b'{"choices":[{"text":"","finish_reason":"length"}]}', False, ""),
        (b'{"choices":[{"text":"x","finish_reason":"length"}]}', True, "x"),
        (b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', False, ""),
        (b'{"choices":[{"delta":{"content":"yo"}}]}', True, "yo"),
        (b'{"choices":[{"delta":{"content":null,"reasoning_content":"hm"}}]}', True, "hm"),
        (b'{"choices":[{"delta":{},"finish_reason":"stop"}]}', False, ""),
    ],
)
def test_what_counts_as_output(payload: bytes, has_token: bool, text: str) -> None:
    choice = decode_chunk(payload).choices[0]
    assert (choice.has_token, choice.new_text) == (has_token, text)


def test_usage_is_read_with_and_without_details() -> None:
    plain = decode_chunk(b'{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}').usage
    assert plain is not None
    assert (plain.prompt_tokens, plain.completion_tokens, plain.cached_tokens) == (7, 2, 0)
    details = b'{"usage":{"prompt_tokens":7,"prompt_tokens_details":{"cached_tokens":4}}}'
    cached = decode_chunk(details).usage
    assert cached is not None
    assert cached.cached_tokens == 4


@pytest.mark.parametrize(
    "payload", [b"{", b"[]", b'{"choices":3}', b'{"choices":[{"text":"\xff"}]}']
)
def test_malformed_chunk_is_a_broken_response(payload: bytes) -> None:
    with pytest.raises(BrokenResponse, match="chunk"):
        decode_chunk(payload)


@pytest.mark.parametrize("error", [b'{"message":"engine died"}', b'"engine died"'])
def test_error_inside_a_stream_is_raised(error: bytes) -> None:
    with pytest.raises(StreamFailed, match="engine died"):
        decode_chunk(b'{"error":' + error + b"}")


async def collect(client: HttpClient) -> list[Chunk]:
    async with contextlib.aclosing(stream_chunks(client, "/v1/completions", {})) as batches:
        return [chunk async for batch in batches for chunk in batch]


async def test_stream_ends_at_done() -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.start_stream()
        await reply.event(text_chunk("a"))
        await reply.end_stream()

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        for _ in range(2):
            assert [chunk.choices[0].text for chunk in await collect(client)] == ["a"]
    assert server.num_connections == 1


async def test_stream_without_done_is_cut() -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.start_stream()
        await reply.event(text_chunk("a"))
        await reply.raw(b"0\r\n\r\n")

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        with pytest.raises(BrokenResponse, match="DONE"):
            await collect(client)


async def test_first_model_is_the_first_listed() -> None:
    async with FakeServer() as server, HttpClient(server.url) as client:
        assert await first_model(client) == "fake-model"


@pytest.mark.parametrize("document", [{"data": []}, {"models": []}, b"nope"])
async def test_unusable_model_list_is_refused(document: object) -> None:
    async def handler(request: FakeRequest, reply: Reply) -> None:
        await reply.send_json(document)

    async with FakeServer(handler) as server, HttpClient(server.url) as client:
        with pytest.raises(BrokenResponse, match="model"):
            await first_model(client)
