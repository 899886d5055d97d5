"""validate_request: what an engine relies on, checked at its border."""

from __future__ import annotations

from xdeepserve.errors import RequestError
from xdeepserve.messages import EngineInfo, GenerateRequest


def validate_request(request: GenerateRequest, info: EngineInfo) -> None:
    """Check what the engine relies on: ids in range and room for at least one output token.

    Raises:
        RequestError: says which value breaks which limit.
    """
    if not request.prompt_token_ids:
        raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
    ids = [*request.prompt_token_ids, *request.resume_token_ids]
    if len(ids) >= info.max_model_len:
        raise RequestError(
            f"the prompt has {len(ids)} tokens, but this model's maximum context length is "
            f"{info.max_model_len} tokens, output included; shorten the prompt",
            code="context_length_exceeded",
            param="prompt",
        )
    if min(ids) < 0 or max(ids) >= info.vocab_size:
        bad = next(i for i in ids if not 0 <= i < info.vocab_size)
        raise RequestError(
            f"token id {bad} is outside the vocabulary of {info.vocab_size} ids", param="prompt"
        )
    if request.params.max_tokens < 1:
        raise RequestError(
            f"max_tokens={request.params.max_tokens} must be at least 1", param="max_tokens"
        )
    if len(request.resume_token_ids) >= request.params.max_tokens:
        raise RequestError(
            f"{len(request.resume_token_ids)} output tokens are there already, but max_tokens="
            f"{request.params.max_tokens}; a finished request cannot be resumed",
            param="max_tokens",
        )
