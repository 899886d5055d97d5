"""A scripted OpenAI-compatible server on a loopback socket: the tests decide every byte and when.

Delays are `asyncio.Event`s that a test sets, never sleeps.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeRequest:
    """One request as it was received."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    """What a handler answers with; each call writes at once."""

    writer: asyncio.StreamWriter
    keep_alive: bool = True

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send_json(self, document: Any, status: int = 200) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        await self.raw(
            f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def start_stream(self) -> None:
        await self.raw(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )

    async def piece(self, data: bytes) -> None:
        await self.raw(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def event(self, document: Any) -> None:
        text = document if isinstance(document, str) else json.dumps(document)
        await self.piece(f"data: {text}\n\n".encode())

    async def end_stream(self) -> None:
        await self.event("[DONE]")
        await self.raw(b"0\r\n\r\n")

    def cut(self) -> None:
        self.keep_alive = False


Handler = Callable[[FakeRequest, Reply], Awaitable[None]]


def text_chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None}


def chat_chunk(content: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": content}, "finish_reason": finish_reason}]}


def usage_chunk(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": completion}
    return {
        "choices": [],
        "usage": usage | {"prompt_tokens_details": {"cached_tokens": cached}},
    }


async def answer(request: FakeRequest, reply: Reply) -> None:
    """A well-behaved server: max_tokens chunks, usage, [DONE]; lists one model."""
    if request.path == "/v1/models":
        await reply.send_json({"object": "list", "data": [{"id": "fake-model"}]})
        return
    body = request.json
    is_chat = "messages" in body
    count = body.get("max_tokens", 3)
    make = chat_chunk if is_chat else text_chunk
    await reply.start_stream()
    if is_chat:
        await reply.event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    for i in range(count):
        await reply.event(make(f"t{i} ", "length" if i == count - 1 else None))
    num_prompt = 5 if is_chat else len(body["prompt"])
    await reply.event(usage_chunk(num_prompt, count))
    await reply.end_stream()


@dataclass
class FakeServer:
    """`async with FakeServer(handler) as server:`; `server.url` is where it listens."""

    handler: Handler = answer
    requests: list[FakeRequest] = field(default_factory=list)
    num_connections: int = 0
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""

    async def __aenter__(self) -> FakeServer:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.num_connections += 1
        try:
            while await self._serve_one(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            self.disconnected.set()
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        method, path, _ = first.split(" ")
        body = await reader.readexactly(int(headers["content-length"]))
        request = FakeRequest(method, path, headers, body)
        self.requests.append(request)
        reply = Reply(writer)
        await self.handler(request, reply)
        return reply.keep_alive


@contextmanager
def served(handler: Handler = answer) -> Iterator[FakeServer]:
    """A FakeServer on a loop of its own in a thread, for tests of blocking entry points."""
    server = FakeServer(handler)
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        runner.run(server.__aenter__())
        thread = threading.Thread(target=loop.run_forever, name="fake-server")
        thread.start()
        try:
            yield server
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=10)
            runner.run(server.__aexit__())
