"""Replay: how a request goes on when its DP group is gone.

The gateway keeps every token it has passed on. Another group takes prompt + those tokens as
`resume_token_ids` and goes on; by law 1 (random numbers are keyed by seed and position, and nothing
else around a request matters) the rest is what the first group would have made.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

from xdeepserve.messages import FinishReason, GenerateRequest, TokenOutput, Usage


class Loss(enum.Enum):
    """What a request had to do with the group that it was lost with."""

    MEANT = "the group is drained"
    WAITING = "the request was too far back in line to be computed"
    RUNNING = "the request may have been computed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPolicy:
    """When a request stops being replayed.

    Attributes:
        max_replays: groups that a request may outlive.
        suspect_after: groups lost in a row, with the request running and without one new token,
            that make it a suspect. A group gets one suspect at a time, so that the next loss
            tells a request that kills what computes it from those that were computed beside it.
        max_stalled_replays: of losses in that row; such a request ends here.
        deadline_s: longest time without a group to run on.
        retry_s: pause between two looks for one; doubles each time when all are full.
        max_retry_s: longest such pause.
    """

    max_replays: int = 16
    suspect_after: int = 2
    max_stalled_replays: int = 3
    deadline_s: float = 30.0
    retry_s: float = 0.02
    max_retry_s: float = 1.0


class Progress:
    """What the client has got of one request, and the request that continues it.

    Attributes:
        request: as the client sent it.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        # Groups that were lost under it, and of those the ones that ran it since its last token.
        self._num_failures = 0
        self._num_stalled_failures = 0
        self._last_failure = ""
        self._num_attempts = 0
        self._token_ids: list[int] = list(request.resume_token_ids)
        self._num_cached_tokens: int | None = None

    def next_attempt(self) -> GenerateRequest:
        """The request for the next group: first as it came, then resumed under an id of its own.

        The id keeps late outputs of one attempt apart from those of the next.
        """
        self._num_attempts += 1
        if self._num_attempts == 1:
            return self.request
        return msgspec.structs.replace(
            self.request,
            request_id=f"{self.request.request_id}~{self._num_attempts}",
            resume_token_ids=self._token_ids.copy(),
        )

    def note_loss(self, loss: Loss, reason: str) -> None:
        """A group ended while it had the request."""
        if loss is Loss.MEANT:
            return
        self._num_failures += 1
        self._num_stalled_failures += loss is Loss.RUNNING
        self._last_failure = reason

    def is_suspect(self, policy: ReplayPolicy) -> bool:
        """Whether the request may be what ended its groups."""
        return self._num_stalled_failures >= policy.suspect_after

    def poison(self, policy: ReplayPolicy) -> str | None:
        """Why the request must not be given to yet another group; None when it may."""
        if self._num_stalled_failures > policy.max_stalled_replays:
            count, when = self._num_stalled_failures, "before its next token"
        elif self._num_failures > policy.max_replays:
            count, when = self._num_failures, "under this request"
        else:
            return None
        return f"{count} DP groups ended {when}; the last one: {self._last_failure}"

    def pass_on(self, output: TokenOutput) -> TokenOutput:
        """Account for an output of any attempt and give it the client's view."""
        if output.token_ids:
            self._token_ids += output.token_ids
            self._num_stalled_failures = 0
        if self._num_cached_tokens is None:
            self._num_cached_tokens = output.usage.num_cached_tokens
        if self._num_attempts == 1:
            return output
        return msgspec.structs.replace(
            output, request_id=self.request.request_id, usage=self._usage()
        )

    def terminal(self, finish_reason: FinishReason, error: str | None = None) -> TokenOutput:
        """A last output that no group made."""
        return TokenOutput(
            request_id=self.request.request_id,
            token_ids=[],
            usage=self._usage(),
            finish_reason=finish_reason,
            error=error,
        )

    def _usage(self) -> Usage:
        """Counts of the client's request: what was computed twice is billed once."""
        return Usage(
            len(self.request.prompt_token_ids), self._num_cached_tokens or 0, len(self._token_ids)
        )
