"""POST /tokenize and /detokenize, in vLLM's shapes."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from xdeepserve.errors import RequestError
from xdeepserve.maas.accounts.caller import caller_of
from xdeepserve.maas.body import parse_json, read_body
from xdeepserve.maas.disconnect import unless_disconnected
from xdeepserve.maas.gateway import Gateway, gateway_of
from xdeepserve.maas.models import json_reply
from xdeepserve.maas.prompts import template_messages
from xdeepserve.maas.schema import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
)


async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of a conversation after the chat template."""
    gateway = gateway_of(request)
    body = await read_body(request, max_bytes=gateway.config.max_body_bytes)
    wanted = parse_json(body, TokenizeRequest)
    if wanted.model is not None:
        gateway.check_model(wanted.model, caller_of(request))
    tokens = await unless_disconnected(request.receive, _tokens(wanted, gateway))
    return json_reply(TokenizeReply(len(tokens), gateway.engine.info.max_model_len, tokens))


async def _tokens(wanted: TokenizeRequest, gateway: Gateway) -> list[int]:
    text, is_chat = await _text(wanted, gateway)
    # A chat template writes BOS itself.
    special = not is_chat if wanted.add_special_tokens is None else wanted.add_special_tokens
    return await gateway.prompts.tokenize(text, add_special_tokens=special)


async def _text(wanted: TokenizeRequest, gateway: Gateway) -> tuple[str, bool]:
    """Text to tokenize, and whether it is a rendered conversation."""
    if (wanted.prompt is None) == (wanted.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if wanted.messages is None:
        return wanted.prompt or "", False
    messages = template_messages(wanted.messages, max_messages=gateway.config.max_messages)
    text = await gateway.prompts.render_chat(
        messages, add_generation_prompt=wanted.add_generation_prompt
    )
    return text, True


async def detokenize(request: Request) -> Response:
    """Text of token ids, special tokens included."""
    gateway = gateway_of(request)
    body = await read_body(request, max_bytes=gateway.config.max_body_bytes)
    wanted = parse_json(body, DetokenizeRequest)
    if wanted.model is not None:
        gateway.check_model(wanted.model, caller_of(request))
    work = gateway.prompts.decode(wanted.tokens)
    return json_reply(DetokenizeReply(await unless_disconnected(request.receive, work)))
