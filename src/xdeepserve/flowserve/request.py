"""Request: one sequence on its way through the scheduler. Only the scheduler changes it."""

from __future__ import annotations

import enum
from array import array
from collections.abc import Iterable

from xdeepserve.flowserve.speculator import DraftRecord
from xdeepserve.flowserve.step import ScheduledRequest
from xdeepserve.messages import (
    FinishReason,
    GenerateRequest,
    TokenLogprobs,
    TokenOutput,
    Usage,
)
from xdeepserve.rtc import KVBlocks


class RequestStatus(enum.Enum):
    """Where a request stands; see docs/design/flowserve.md for the drawing."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Request:
    """State of one accepted request.

    Attributes:
        request_id: the client's id.
        params: sampling parameters.
        order: (priority, arrival number); the smaller is served first.
        token_ids: int32 array, prompt then output.
        num_prompt_tokens: length of the prompt.
        end_ids: ids that end it with `stop`, once it has more than `min_num_tokens` tokens.
        max_num_tokens: length, prompt included, at which it ends with `length`.
        num_computed_tokens: leading tokens whose KV is in `blocks`.
        num_cached_tokens: prompt tokens served by the prefix cache when it first ran; None before.
        blocks: KV blocks held; empty unless running.
        drafts: what its drafts came to; changed by the speculator alone.
        status: see RequestStatus.
    """

    __slots__ = (
        "blocks",
        "drafts",
        "end_ids",
        "max_num_tokens",
        "min_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "order",
        "params",
        "request_id",
        "status",
        "token_ids",
    )

    def __init__(
        self,
        request: GenerateRequest,
        *,
        arrival: int,
        blocks: KVBlocks,
        eos_token_ids: Iterable[int],
        max_model_len: int,
    ) -> None:
        self.request_id = request.request_id
        self.params = params = request.params
        self.order = (request.priority, arrival)
        self.token_ids: array[int] = array("i", request.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.token_ids.extend(request.resume_token_ids)
        eos = () if params.ignore_eos else eos_token_ids
        self.end_ids = frozenset((*params.stop_token_ids, *eos))
        self.min_num_tokens = self.num_prompt_tokens + params.min_tokens
        self.max_num_tokens = min(self.num_prompt_tokens + params.max_tokens, max_model_len)
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.blocks = blocks
        self.drafts = DraftRecord()
        self.status = RequestStatus.WAITING

    @property
    def num_tokens(self) -> int:
        """Prompt plus output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Output so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens whose KV is still to be made; at least one until the request ends."""
        return len(self.token_ids) - self.num_computed_tokens

    def share_of_step(self, num_tokens: int) -> ScheduledRequest:
        """This request's entry in a plan that computes its next `num_tokens` tokens."""
        num_computed = self.num_computed_tokens
        return ScheduledRequest(
            self.request_id,
            self.params,
            self.token_ids,
            self.num_prompt_tokens,
            num_computed,
            num_tokens,
            self.blocks.block_ids,
            num_computed + num_tokens == len(self.token_ids),
        )

    def append(self, token_id: int) -> FinishReason | None:
        """Add an output token; why it is the last, if it is."""
        self.token_ids.append(token_id)
        num_tokens = len(self.token_ids)
        if token_id in self.end_ids and num_tokens > self.min_num_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens >= self.max_num_tokens else None

    def output(
        self,
        *,
        num_new: int = 0,
        logprobs: list[TokenLogprobs] | None = None,
        finish_reason: FinishReason | None = None,
        error: str | None = None,
    ) -> TokenOutput:
        """The message about the last `num_new` output tokens, with the counts up to now."""
        num_tokens, num_prompt = len(self.token_ids), self.num_prompt_tokens
        return TokenOutput(
            request_id=self.request_id,
            token_ids=self.token_ids[num_tokens - num_new :].tolist(),
            usage=Usage(num_prompt, self.num_cached_tokens or 0, num_tokens - num_prompt),
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_token_id=self.token_ids[-1] if finish_reason is FinishReason.STOP else None,
            error=error,
        )
