"""StepPlan and StepResult: all that passes between scheduler and executor.

`schedule` decides, `execute` computes, `update` commits. An executor reads a plan and never
changes it; a plan is valid until the scheduler is called again.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import NamedTuple

from xdeepserve.messages import SamplingParams, TokenLogprobs


class ScheduledRequest(NamedTuple):
    """One request's share of a step. Everything here is whole, not a diff.

    A named tuple, because it is made for every request in every step and a frozen dataclass costs
    five times as much to make.
    """

    request_id: str
    # How to choose the next token.
    params: SamplingParams
    # The sequence so far, prompt then output; the scheduler's own array, borrowed for the step.
    token_ids: array[int]
    # How many of `token_ids` are prompt.
    num_prompt_tokens: int
    # Tokens whose KV is there already; the position of this step's first token.
    num_computed_tokens: int
    # Tokens to compute now, at least one: token_ids[num_computed_tokens:][:num_scheduled_tokens].
    num_scheduled_tokens: int
    # Physical KV blocks in order of position, enough for this step; borrowed for the step.
    block_ids: array[int]
    # Whether this step reaches the end of `token_ids`, so that a token is sampled.
    samples: bool


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. The executor keeps the order of `scheduled` in its result."""

    # Counts steps from 0; part of every exchange's tag.
    step_idx: int
    # Requests that get tokens, in order of service; each request at most once.
    scheduled: tuple[ScheduledRequest, ...]
    # Sum of num_scheduled_tokens; 0 for the empty plan.
    num_tokens: int

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.scheduled


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced, aligned with StepPlan.scheduled."""

    # New ids per request, in order; empty where the request does not sample yet. More than one id
    # when several were accepted at once (speculative decoding).
    token_ids: tuple[tuple[int, ...], ...]
    # One entry per new id where the request asked for logprobs, else None.
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...]
