"""Logprobs in OpenAI's two shapes: chat (objects per token) and completions (parallel lists)."""

from __future__ import annotations

from collections.abc import Sequence

from xdeepserve.maas.choice import TokenEntry
from xdeepserve.maas.schema import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)
from xdeepserve.text.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def chat_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> ChatLogprobs:
    """`choices[].logprobs` of chat completions."""
    return ChatLogprobs([_chat_token(entry, tokenizer) for entry in entries])


def _chat_token(entry: TokenEntry, tokenizer: Tokenizer) -> ChatTokenLogprob:
    chosen = _top(entry.token_id, entry.logprobs.logprob, tokenizer)
    tops = [
        _top(token_id, logprob, tokenizer)
        for token_id, logprob in zip(
            entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True
        )
    ]
    return ChatTokenLogprob(chosen.token, chosen.logprob, chosen.bytes, tops)


def _top(token_id: int, logprob: float, tokenizer: Tokenizer) -> TopLogprob:
    raw = tokenizer.token_bytes(token_id)
    return TopLogprob(raw.decode("utf-8", "replace"), max(logprob, MIN_LOGPROB), list(raw))


def completion_logprobs(entries: Sequence[TokenEntry], tokenizer: Tokenizer) -> CompletionLogprobs:
    """`choices[].logprobs` of text completions."""
    return CompletionLogprobs(
        tokens=[token_text(entry.token_id, tokenizer) for entry in entries],
        token_logprobs=[max(entry.logprobs.logprob, MIN_LOGPROB) for entry in entries],
        top_logprobs=[_top_dict(entry, tokenizer) for entry in entries],
        text_offset=[entry.text_offset for entry in entries],
    )


def _top_dict(entry: TokenEntry, tokenizer: Tokenizer) -> dict[str, float]:
    """Alternatives, and the chosen token if it is not among them."""
    found = {
        token_text(token_id, tokenizer): max(logprob, MIN_LOGPROB)
        for token_id, logprob in zip(
            entry.logprobs.top_ids, entry.logprobs.top_logprobs, strict=True
        )
    }
    chosen = token_text(entry.token_id, tokenizer)
    found.setdefault(chosen, max(entry.logprobs.logprob, MIN_LOGPROB))
    return found


def token_text(token_id: int, tokenizer: Tokenizer) -> str:
    """A token as text; `bytes:\\xe2\\x82` for one that is only a part of a code point."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
