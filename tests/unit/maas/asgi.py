"""Drives an ASGI app by hand, so that a test decides when the client goes away."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.applications import Starlette
from starlette.types import Message

from tests.unit.maas.replay_engine import ReplayEngine
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.config import GatewayConfig
from xdeepserve.maas.app import create_app

MODEL = "toy"


def open_app(engine: ReplayEngine, *, config: GatewayConfig | None = None) -> Starlette:
    """An app without a chat template, so that no child process is needed."""
    tokenizer = byte_tokenizer(chat_template=None)
    return create_app(engine, tokenizer, config or GatewayConfig(), model_names=[MODEL])


class Call:
    """One request to an ASGI app, running as a task.

    Attributes:
        sent: what the app sent.
        first_body: set when the app sent body bytes.
        is_reading: while cleared, the app's writes of body bytes wait.
    """

    def __init__(
        self,
        app: Starlette,
        path: str,
        body: object = None,
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        chunks: list[bytes] | None = None,
        query: str = "",
    ) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.sent: list[Message] = []
        self.first_body = asyncio.Event()
        self.is_reading = asyncio.Event()
        self.is_reading.set()
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        parts = chunks if chunks is not None else [raw]
        for i, part in enumerate(parts):
            more = i < len(parts) - 1
            self._inbox.put_nowait({"type": "http.request", "body": part, "more_body": more})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.task = asyncio.create_task(app(scope, self._inbox.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.first_body.set()
            await self.is_reading.wait()

    def disconnect(self) -> None:
        """The client goes away."""
        self._inbox.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    def json(self) -> Any:
        return json.loads(self.body)


async def call(app: Starlette, path: str, body: object = None, **options: Any) -> Call:
    """Run a request to its end."""
    running = Call(app, path, body, **options)
    await running.task
    return running


def events(body: bytes) -> list[Any]:
    """Payloads of an SSE body; `[DONE]` stays a string."""
    payloads = [line[6:] for line in body.decode().split("\n\n") if line]
    return [p if p == "[DONE]" else json.loads(p) for p in payloads]
