"""GET /v1/models and /v1/models/{name}."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from xdeepserve.maas.accounts.caller import caller_of
from xdeepserve.maas.gateway import Gateway, gateway_of
from xdeepserve.maas.schema import ModelCard, ModelList


def json_reply(body: msgspec.Struct) -> Response:
    """A 200 with a JSON body."""
    return Response(msgspec.json.encode(body), media_type="application/json")


async def list_models(request: Request) -> Response:
    """The served names that the caller may use."""
    gateway = gateway_of(request)
    names = gateway.models_for(caller_of(request))
    return json_reply(ModelList(data=[_card(name, gateway) for name in names]))


async def retrieve_model(request: Request) -> Response:
    """One served name; 404 for others."""
    gateway = gateway_of(request)
    name = request.path_params["name"]
    gateway.check_model(name, caller_of(request))
    return json_reply(_card(name, gateway))


def _card(name: str, gateway: Gateway) -> ModelCard:
    return ModelCard(
        id=name, created=gateway.started_s, max_model_len=gateway.engine.info.max_model_len
    )
