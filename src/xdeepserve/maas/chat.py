"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from xdeepserve.errors import RequestError
from xdeepserve.maas.accounts.caller import Caller, caller_of
from xdeepserve.maas.body import parse_json, read_body
from xdeepserve.maas.choice import ChoiceDelta
from xdeepserve.maas.disconnect import unless_disconnected
from xdeepserve.maas.gateway import Gateway, gateway_of, new_request_id
from xdeepserve.maas.generation import GenerationPlan, UsageTotals
from xdeepserve.maas.logprobs import chat_logprobs
from xdeepserve.maas.prompts import PromptEncoder, template_messages
from xdeepserve.maas.sampling import cache_salt, check_num_sequences, sampling_params
from xdeepserve.maas.schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
)
from xdeepserve.maas.sse import GenerationResponse, usage_info
from xdeepserve.text.tokenizer import Tokenizer


async def create_chat_completion(request: Request) -> Response:
    """Validate, render, tokenize; the response object then runs the generation."""
    gateway = gateway_of(request)
    arrived_s = gateway.clock.monotonic()
    body = await read_body(request, max_bytes=gateway.config.max_body_bytes)
    chat = parse_json(body, ChatCompletionRequest)
    caller = caller_of(request)
    gateway.admit(chat.model, caller)
    plan = await unless_disconnected(request.receive, _plan(chat, gateway, caller, arrived_s))
    request_id = new_request_id("chatcmpl")
    return GenerationResponse(
        gateway=gateway,
        plan=plan,
        reply=ChatReply(chat, gateway, request_id),
        request_id=request_id,
        is_stream=bool(chat.stream),
    )


async def _plan(
    chat: ChatCompletionRequest, gateway: Gateway, caller: Caller, arrived_s: float
) -> GenerationPlan:
    _check_chat_fields(chat)
    params = sampling_params(
        chat,
        max_tokens=chat.max_tokens if chat.max_completion_tokens is None
        else chat.max_completion_tokens,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        info=gateway.engine.info,
        config=gateway.config,
        defaults=gateway.defaults,
    )  # fmt: skip
    check_num_sequences(1, chat.n or 1)
    options = gateway.text_options(chat)
    messages = template_messages(chat.messages, max_messages=gateway.config.max_messages)
    text = await _prompt_text(chat, messages, gateway.prompts)
    token_ids = await gateway.prompts.encode(text, add_special_tokens=False, param="messages")
    return GenerationPlan(
        prompts=[(token_ids, gateway.prompts.fit(token_ids, params, param="messages"))],
        num_choices=chat.n or 1,
        options=options,
        arrived_s=arrived_s,
        cache_salt=caller.salt(cache_salt(chat.cache_salt)),
        caller=caller,
    )


def _check_chat_fields(chat: ChatCompletionRequest) -> None:
    if chat.top_logprobs is not None and not chat.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    if chat.tool_choice not in (None, "none", "auto"):
        raise RequestError("tool_choice is not supported", param="tool_choice", code="unsupported")
    if chat.function_call not in (None, "none", "auto"):
        raise RequestError(
            "function_call is not supported", param="function_call", code="unsupported"
        )
    if chat.modalities not in (None, [], ["text"]):
        raise RequestError("modalities must be ['text']", param="modalities", code="unsupported")
    if chat.continue_final_message and chat.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            param="continue_final_message",
        )


async def _prompt_text(
    chat: ChatCompletionRequest, messages: list[dict[str, Any]], prompts: PromptEncoder
) -> str:
    """Rendered conversation; cut after the last message's content when it is to be continued."""
    text = await prompts.render_chat(
        messages,
        add_generation_prompt=chat.add_generation_prompt is not False
        and not chat.continue_final_message,
        variables=chat.chat_template_kwargs,
    )
    if not chat.continue_final_message:
        return text
    content = messages[-1]["content"].strip()
    start = text.rfind(content) if messages[-1]["role"] == "assistant" and content else -1
    if start < 0:
        raise RequestError(
            "continue_final_message needs a last message of the assistant that is not empty",
            param="continue_final_message",
        )
    return text[: start + len(content)]


class ChatReply:
    """The objects of one chat completion."""

    def __init__(self, chat: ChatCompletionRequest, gateway: Gateway, request_id: str) -> None:
        self._tokenizer: Tokenizer = gateway.tokenizer
        self._has_logprobs = bool(chat.logprobs)
        self._has_usage = chat.stream_options is not None and chat.stream_options.include_usage
        self._envelope = msgspec.structs.asdict(gateway.envelope(request_id, "chat.completion"))
        self._opened: set[int] = set()

    def chunks(self, delta: ChoiceDelta) -> Sequence[msgspec.Struct]:
        """Role once per choice, then text, then an empty delta with the finish reason."""
        choices: list[ChatChunkChoice] = []
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            opening = ChatDelta(role="assistant", content="")
            choices.append(ChatChunkChoice(index=delta.index, delta=opening))
        if delta.text or delta.entries:
            choices.append(
                ChatChunkChoice(
                    index=delta.index,
                    delta=ChatDelta(content=delta.text),
                    logprobs=self._logprobs(delta),
                )
            )
        if delta.finish_reason is not None:
            choices.append(
                ChatChunkChoice(
                    index=delta.index, delta=ChatDelta(), finish_reason=delta.finish_reason
                )
            )
        return [self._chunk([choice]) for choice in choices]

    def usage_chunk(self, usage: UsageTotals) -> msgspec.Struct | None:
        """A chunk without choices that carries the usage."""
        if not self._has_usage:
            return None
        chunk = self._chunk([])
        chunk.usage = usage_info(usage)
        return chunk

    def whole(self, choices: Sequence[ChoiceDelta], usage: UsageTotals) -> msgspec.Struct:
        """chat.completion."""
        return ChatCompletion(
            **{**self._envelope, "usage": usage_info(usage)},
            choices=[
                ChatChoice(
                    choice.index,
                    AssistantMessage(content=choice.text),
                    self._logprobs(choice),
                    choice.finish_reason,
                )
                for choice in choices
            ],
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(**self._envelope, choices=choices)
        chunk.object = "chat.completion.chunk"
        if self._has_usage:
            chunk.usage = None
        return chunk

    def _logprobs(self, delta: ChoiceDelta) -> ChatLogprobs | None:
        return chat_logprobs(delta.entries, self._tokenizer) if self._has_logprobs else None
