"""Routes, lifespan and wiring of the HTTP edge; nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext

from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.config import GatewayConfig
from xdeepserve.engine_api import EngineClient
from xdeepserve.errors import ConfigError, XDeepServeError
from xdeepserve.maas.access import OPEN, Access, AccessMiddleware
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
from xdeepserve.maas.usage import get_usage
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
)
KEYED_ROUTES = (Route("/v1/usage", get_usage, methods=["GET"]),)
"""Of a service with keys."""

OPEN_ROUTES = (Route("/metrics", get_metrics, methods=["GET"]),)
"""Of a service without keys; else they are for the operator alone, on the admin listener."""


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    config: GatewayConfig,
    *,
    model_names: Sequence[str],
    defaults: SamplingDefaults = PLAIN_SAMPLING,
    collectors: Sequence[Collector] = (),
    access: Access = OPEN,
) -> Starlette:
    """The ASGI app over one engine. Its lifespan ends by closing the engine.

    `app.state.gateway` is the Gateway; `server.run_server` drains it.

    Args:
        model_names: names clients may use for the model, at least one; the first is canonical.
        defaults: sampling parameters for requests that name none.
        collectors: further metrics for `/metrics`; their `collect` must not block.
        access: who gets in, and who pays.

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
        routes=[*ROUTES, *(OPEN_ROUTES if access.keys is None else KEYED_ROUTES)],
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(AccessMiddleware, keys=access.keys, hosts=config.host_names),
        ],
        exception_handlers={
            XDeepServeError: on_error,
            HTTPException: on_http_exception,
            ClientGone: on_client_gone,
        },
        lifespan=_lifespan,
    )
    app.state.gateway = gateway = Gateway(
        engine=engine,
        prompts=prompts,
        config=config,
        model_names=model_names,
        clock=SYSTEM_CLOCK,
        defaults=defaults,
        billing=access.billing,
    )
    app.state.access = access
    for collector in collectors:
        gateway.metrics.registry.register(collector)
    return app


@asynccontextmanager
async def _lifespan(app: Starlette) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    access: Access = app.state.access
    try:
        async with nullcontext() if access.admin is None else access.admin(gateway):
            yield
    finally:
        gateway.begin_drain()
        gateway.prompts.close()
        await gateway.engine.close(drain_timeout_s=0.0)
