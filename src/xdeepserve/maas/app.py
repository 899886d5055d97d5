"""Routes, lifespan and wiring of the HTTP edge; nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.config import GatewayConfig
from xdeepserve.engine_api import EngineClient
from xdeepserve.errors import ConfigError, XDeepServeError
from xdeepserve.maas.chat import create_chat_completion
from xdeepserve.maas.completions import create_completion
from xdeepserve.maas.gateway import Gateway
from xdeepserve.maas.health import health, ready
from xdeepserve.maas.http_errors import ClientGone, on_client_gone, on_error, on_http_exception
from xdeepserve.maas.metrics import get_metrics
from xdeepserve.maas.models import list_models, retrieve_model
from xdeepserve.maas.prompts import PromptEncoder
from xdeepserve.maas.request_id import RequestIdMiddleware
from xdeepserve.maas.tokenize import detokenize, tokenize
from xdeepserve.text.chat_template import ChatTemplate
from xdeepserve.text.generation_config import SamplingDefaults
from xdeepserve.text.tokenizer import Tokenizer

PLAIN_SAMPLING = SamplingDefaults()

ROUTES = (
    Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
    Route("/v1/completions", create_completion, methods=["POST"]),
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{name:path}", retrieve_model, methods=["GET"]),
    Route("/tokenize", tokenize, methods=["POST"]),
    Route("/detokenize", detokenize, methods=["POST"]),
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/metrics", get_metrics, methods=["GET"]),
)


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    config: GatewayConfig,
    *,
    model_names: Sequence[str],
    clock: Clock = SYSTEM_CLOCK,
    defaults: SamplingDefaults = PLAIN_SAMPLING,
    collectors: Sequence[Collector] = (),
) -> Starlette:
    """The ASGI app over one engine. Its lifespan ends by closing the engine.

    `app.state.gateway` is the Gateway; `server.run_server` drains it.

    Args:
        model_names: names clients may use for the model, at least one; the first is canonical.
        defaults: sampling parameters for requests that name none.
        collectors: further metrics for `/metrics`; their `collect` must not block.

    Raises:
        ConfigError: no name, or the model's chat template does not compile (ModelFormatError).
    """
    if not model_names:
        raise ConfigError("model_names is empty; at least one name must be served")
    template: ChatTemplate | None = None
    if tokenizer.chat_template is not None:
        template = ChatTemplate(tokenizer.chat_template, special_tokens=tokenizer.special_tokens)
        template.check()
    prompts = PromptEncoder(tokenizer, template, engine.info)
    app = Starlette(
        routes=ROUTES,
        middleware=[Middleware(RequestIdMiddleware)],
        exception_handlers={
            XDeepServeError: on_error,
            HTTPException: on_http_exception,
            ClientGone: on_client_gone,
        },
        lifespan=_lifespan,
    )
    app.state.gateway = gateway = Gateway(
        engine=engine,
        tokenizer=tokenizer,
        prompts=prompts,
        config=config,
        model_names=model_names,
        clock=clock,
        defaults=defaults,
    )
    for collector in collectors:
        gateway.metrics.registry.register(collector)
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    try:
        yield
    finally:
        gateway.begin_drain()
        gateway.prompts.close()
        await gateway.engine.close(drain_timeout_s=0.0)
