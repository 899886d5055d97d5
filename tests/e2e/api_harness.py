"""The app over a replaying engine, called in this process by the official SDK or a plain client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx2
from openai import AsyncOpenAI
from starlette.applications import Starlette

from tests.unit.maas.replay_engine import ReplayEngine
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.config import GatewayConfig
from xdeepserve.maas.app import create_app

MODEL = "toy"
BASE_URL = "http://localhost"


def make_app(
    engine: ReplayEngine,
    *,
    config: GatewayConfig | None = None,
    model_names: Sequence[str] = (MODEL,),
) -> Starlette:
    """An app with the byte tokenizer and a ChatML template."""
    return create_app(engine, byte_tokenizer(), config or GatewayConfig(), model_names=model_names)


@asynccontextmanager
async def plain_client(app: Starlette) -> AsyncIterator[httpx2.AsyncClient]:
    """An HTTP client of the app; the app's lifespan runs around it."""
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url=BASE_URL) as client,
    ):
        yield client


@asynccontextmanager
async def sdk_client(app: Starlette) -> AsyncIterator[AsyncOpenAI]:
    """The official SDK, talking to the app."""
    async with (
        plain_client(app) as http,
        AsyncOpenAI(
            base_url=f"{BASE_URL}/v1", api_key="none", max_retries=0, http_client=http
        ) as client,
    ):
        yield client
