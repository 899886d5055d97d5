"""POST /v1/completions: prompts as text, as token ids, or lists of either."""

from __future__ import annotations

from collections.abc import Sequence

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
from xdeepserve.maas.logprobs import completion_logprobs
from xdeepserve.maas.sampling import (
    cache_salt,
    check_num_sequences,
    check_token_ids,
    sampling_params,
)
from xdeepserve.maas.schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from xdeepserve.maas.sse import GenerationResponse, usage_info
from xdeepserve.messages import SamplingParams

Prompt = str | list[int]


async def create_completion(request: Request) -> Response:
    """Validate and tokenize; the response object then runs the generation."""
    gateway = gateway_of(request)
    arrived_s = gateway.clock.monotonic()
    body = await read_body(request, max_bytes=gateway.config.max_body_bytes)
    completion = parse_json(body, CompletionRequest)
    caller = caller_of(request)
    gateway.admit(completion.model, caller)
    work = _plan(completion, gateway, caller, arrived_s)
    plan, echoes = await unless_disconnected(request.receive, work)
    request_id = new_request_id("cmpl")
    return GenerationResponse(
        gateway=gateway,
        plan=plan,
        reply=CompletionReply(completion, gateway, request_id, echoes),
        request_id=request_id,
        is_stream=bool(completion.stream),
    )


async def _plan(
    completion: CompletionRequest, gateway: Gateway, caller: Caller, arrived_s: float
) -> tuple[GenerationPlan, list[str]]:
    """What to run, and the text in front of each choice (none without `echo`)."""
    params = _checked_params(completion, gateway)
    options = gateway.text_options(completion)
    prompts = split_prompts(completion.prompt, max_prompts=gateway.config.max_prompts)
    num_choices = completion.n or 1
    check_num_sequences(len(prompts), num_choices)
    plan = GenerationPlan(
        prompts=[await _encode(prompt, params, gateway) for prompt in prompts],
        num_choices=num_choices,
        options=options,
        arrived_s=arrived_s,
        cache_salt=caller.salt(cache_salt(completion.cache_salt)),
        caller=caller,
    )
    echoes = [await _echo(prompt, gateway) for prompt in prompts] if completion.echo else []
    return plan, [echo for echo in echoes for _ in range(num_choices)]


def _checked_params(completion: CompletionRequest, gateway: Gateway) -> SamplingParams:
    if completion.echo and completion.logprobs is not None:
        raise RequestError(
            "echo with logprobs is not supported (logprobs of prompt tokens are not computed)",
            param="echo",
            code="unsupported",
        )
    return sampling_params(
        completion,
        max_tokens=completion.max_tokens,
        logprobs=completion.logprobs,
        info=gateway.engine.info,
        config=gateway.config,
        defaults=gateway.defaults,
    )


def split_prompts(prompt: str | list[str | int | list[int]], *, max_prompts: int) -> list[Prompt]:
    """The prompts of a request: one text, texts, one list of ids, or lists of ids.

    Raises:
        RequestError: empty, too many, or a mixture of kinds.
    """
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return [ids]
    texts = [item for item in prompt if isinstance(item, str)]
    lists = [item for item in prompt if isinstance(item, list)]
    if not 1 <= len(prompt) <= max_prompts:
        raise RequestError(
            f"prompt has {len(prompt)} entries; between 1 and {max_prompts} are allowed",
            param="prompt",
        )
    if len(texts) == len(prompt):
        return [*texts]
    if len(lists) == len(prompt):
        return [*lists]
    raise RequestError(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists",
        param="prompt",
    )


async def _encode(
    prompt: Prompt, params: SamplingParams, gateway: Gateway
) -> tuple[list[int], SamplingParams]:
    if isinstance(prompt, str):
        token_ids = await gateway.prompts.encode(prompt, add_special_tokens=True, param="prompt")
        return token_ids, gateway.prompts.fit(token_ids, params, param="prompt")
    fitted = gateway.prompts.fit(prompt, params, param="prompt")
    check_token_ids("prompt", prompt, gateway.engine.info)
    return prompt, fitted


async def _echo(prompt: Prompt, gateway: Gateway) -> str:
    return prompt if isinstance(prompt, str) else await gateway.prompts.decode(prompt)


class CompletionReply:
    """The objects of one text completion.

    Args:
        echoes: text in front of each choice; empty without `echo`.
    """

    def __init__(
        self,
        completion: CompletionRequest,
        gateway: Gateway,
        request_id: str,
        echoes: Sequence[str],
    ) -> None:
        self._tokenizer = gateway.tokenizer
        self._has_logprobs = completion.logprobs is not None
        options = completion.stream_options
        self._has_usage = options is not None and options.include_usage
        self._envelope = msgspec.structs.asdict(gateway.envelope(request_id, "text_completion"))
        self._echoes = dict(enumerate(echoes))

    def chunks(self, delta: ChoiceDelta) -> Sequence[msgspec.Struct]:
        """One chunk per delta; the last carries the finish reason."""
        chunk = Completion(**self._envelope, choices=[self._choice(delta)])
        if self._has_usage:
            chunk.usage = None
        return [chunk]

    def usage_chunk(self, usage: UsageTotals) -> msgspec.Struct | None:
        """A chunk without choices that carries the usage."""
        return self._completion([], usage) if self._has_usage else None

    def whole(self, choices: Sequence[ChoiceDelta], usage: UsageTotals) -> msgspec.Struct:
        """text_completion."""
        return self._completion([self._choice(choice) for choice in choices], usage)

    def _completion(self, choices: list[CompletionChoice], usage: UsageTotals) -> Completion:
        return Completion(**{**self._envelope, "usage": usage_info(usage)}, choices=choices)

    def _choice(self, delta: ChoiceDelta) -> CompletionChoice:
        """The echoed prompt goes in front of the first text of its choice."""
        echo = self._echoes.pop(delta.index, "")
        return CompletionChoice(
            index=delta.index,
            text=echo + delta.text,
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
        )

    def _logprobs(self, delta: ChoiceDelta) -> CompletionLogprobs | None:
        return completion_logprobs(delta.entries, self._tokenizer) if self._has_logprobs else None
