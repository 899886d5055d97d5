"""Text and messages -> prompt token ids, off the event loop where it takes long.

Owns a small bounded thread pool (tokenizing releases the GIL) and the chat template's child.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import msgspec

from xdeepserve.errors import CapacityError, PayloadTooLarge, RequestError
from xdeepserve.maas.sampling import check_token_ids
from xdeepserve.maas.schema import ChatMessage
from xdeepserve.messages import EngineInfo, SamplingParams
from xdeepserve.text.chat_template import ChatTemplate
from xdeepserve.text.tokenizer import Tokenizer

T = TypeVar("T")

NUM_THREADS = 2
MAX_QUEUED_SIZE = 8 << 20
"""Characters (ids when decoding) handed to the threads at a time: a few seconds of work."""
MIN_QUEUED_SIZE = MAX_QUEUED_SIZE // 256
"""What the smallest work counts as, so that its number is bounded too."""
MAX_TOKENIZE_BYTES = 1 << 20
"""Longest text for /tokenize, which may be longer than the context."""
INLINE_CHARS = 4096
"""Texts up to this long are tokenized on the event loop (under a few milliseconds)."""


class PromptEncoder:
    """Makes prompts of one model.

    Args:
        template: None if the model has none; chat requests are then refused.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, info: EngineInfo
    ) -> None:
        self.tokenizer = tokenizer
        self._template = template
        self._info = info
        self._max_text_bytes = info.max_model_len * tokenizer.max_token_bytes
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="xds-text")
        self._queued_size = 0

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a text.

        Args:
            param: the request field that the text came from, for errors.

        Raises:
            RequestError: the text cannot fit into the context, however it is tokenized.
            CapacityError: too many long texts are waiting.
        """
        self._check_length(len(text.encode()), param)
        return await self._encode(text, add_special_tokens)

    async def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text that need not fit into the context.

        Raises:
            PayloadTooLarge: the text is longer than MAX_TOKENIZE_BYTES.
            CapacityError: too many long texts are waiting.
        """
        num_bytes = len(text.encode())
        if num_bytes > MAX_TOKENIZE_BYTES:
            raise PayloadTooLarge(
                f"the text has {num_bytes} bytes; at most {MAX_TOKENIZE_BYTES} are tokenized "
                "at a time; split it",
                code="request_too_large",
            )
        return await self._encode(text, add_special_tokens)

    async def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        def work() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        return work() if len(text) <= INLINE_CHARS else await self._off_loop(work, len(text))

    async def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens included.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        check_token_ids("tokens", token_ids, self._info)

        def work() -> str:
            return self.tokenizer.decode(token_ids, skip_special_tokens=False)

        size = len(token_ids)
        return work() if size <= INLINE_CHARS else await self._off_loop(work, size)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Prompt text of a conversation.

        Raises:
            RequestError: the model has no chat template, or it refused the messages, or they
                cannot fit into the context.
        """
        num_bytes = sum(len(m["content"].encode()) for m in messages)
        self._check_length(num_bytes, "messages")
        template = self._template
        if template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions", code="no_chat_template"
            )

        def work() -> str:
            return template.render(
                messages, add_generation_prompt=add_generation_prompt, variables=variables
            )

        return await self._off_loop(work, num_bytes)

    def _check_length(self, num_bytes: int, param: str) -> None:
        """Refuse what is too long before work goes into it."""
        if num_bytes <= self._max_text_bytes:
            return
        at_least = -(-num_bytes // self.tokenizer.max_token_bytes)
        raise RequestError(
            f"the text has {num_bytes} bytes, so at least {at_least} tokens; the model's context "
            f"holds {self._info.max_model_len}; shorten it",
            code="context_length_exceeded",
            param=param,
        )

    def fit(self, token_ids: list[int], params: SamplingParams, *, param: str) -> SamplingParams:
        """`params` with max_tokens clipped to what the context leaves after the prompt.

        Args:
            param: the request field that the prompt came from, for errors.

        Raises:
            RequestError: the prompt is empty or leaves no room (`context_length_exceeded`).
        """
        if not token_ids:
            raise RequestError("the prompt has no tokens", param=param)
        room = self._info.max_model_len - len(token_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; the model's context holds "
                f"{self._info.max_model_len}, at least one of them for output; shorten the prompt",
                code="context_length_exceeded",
                param=param,
            )
        max_tokens = min(params.max_tokens, room)
        return msgspec.structs.replace(
            params, max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens)
        )

    def close(self) -> None:
        """End the threads and the template's child."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._template is not None:
            self._template.close()

    async def _off_loop(self, work: Callable[[], T], size: int) -> T:
        """Run in a thread; work that has not begun is dropped when the caller is cancelled."""
        size = max(size, MIN_QUEUED_SIZE)
        if self._queued_size and self._queued_size + size > MAX_QUEUED_SIZE:
            raise CapacityError("too much text is waiting to be tokenized; try again")
        self._queued_size += size
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work)
        finally:
            self._queued_size -= size


def template_messages(messages: list[ChatMessage], *, max_messages: int) -> list[dict[str, Any]]:
    """Messages as templates expect them: content as one string.

    Text parts are joined by newlines; `developer` becomes `system`, the name that open models know.

    Raises:
        RequestError: none or too many messages, a part that is not text, or no content.
    """
    if not 1 <= len(messages) <= max_messages:
        raise RequestError(
            f"messages has {len(messages)} entries; between 1 and {max_messages} are allowed",
            param="messages",
        )
    return [_template_message(i, message) for i, message in enumerate(messages)]


def _template_message(index: int, message: ChatMessage) -> dict[str, Any]:
    where = f"messages[{index}]"
    if message.tool_calls:
        raise RequestError(
            f"{where}.tool_calls is not supported", param=f"{where}.tool_calls", code="unsupported"
        )
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _content_text(where, message)}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _content_text(where: str, message: ChatMessage) -> str:
    param = f"{where}.content"
    if message.content is None:
        raise RequestError(f"{param} must be a string or a list of text parts", param=param)
    if isinstance(message.content, str):
        return message.content
    for part in message.content:
        if part.type != "text" or part.text is None:
            raise RequestError(
                f"{param} has a part of type {part.type[:40]!r}; only text parts "
                "with a `text` string are supported",
                param=param,
            )
    return "\n".join(part.text or "" for part in message.content)
