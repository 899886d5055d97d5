"""StepPlan and StepResult: all that passes between scheduler and executor.

`schedule` decides, `execute` computes, `update` commits. An executor reads a plan and never
changes it; a plan is valid until the scheduler is called again.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
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
    # Guesses at what follows `token_ids`, computed behind them; each is kept iff the id sampled at
    # its position is the same. Empty unless the request samples.
    draft_token_ids: tuple[int, ...] = ()
    # Drafts that the executor should make for the next step, if it has an MTP layer; 0 = leave the
    # layer alone.
    num_drafts_wanted: int = 0

    @property
    def num_rows(self) -> int:
        """Tokens computed, drafts included."""
        return self.num_scheduled_tokens + len(self.draft_token_ids)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes. The executor keeps the order of `scheduled` in its result."""

    # Counts steps from 0; part of every exchange's tag.
    step_idx: int
    # Requests that get tokens, in order of service; each request at most once.
    scheduled: tuple[ScheduledRequest, ...]
    # Sum of num_rows; 0 for the empty plan.
    num_tokens: int

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.scheduled

    @property
    def num_drafts(self) -> int:
        """Drafts that the step checks."""
        return sum(len(item.draft_token_ids) for item in self.scheduled)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced, aligned with StepPlan.scheduled."""

    # New ids per request, in order; empty where the request does not sample yet. The longest prefix
    # of its drafts that sampling confirms, then the id sampled behind it.
    token_ids: tuple[tuple[int, ...], ...]
    # One entry per new id where the request asked for logprobs, else None.
    logprobs: tuple[tuple[TokenLogprobs, ...] | None, ...]
    # What the executor guesses to follow, aligned as well; empty if nobody wanted any.
    draft_token_ids: tuple[tuple[int, ...], ...] = ()
    # Time that making those took.
    drafting_s: float = 0.0


def num_confirmed(draft_token_ids: Sequence[int], sampled_token_ids: Sequence[int]) -> int:
    """Length of the longest prefix of the drafts that equals what was sampled in its places."""
    pairs = zip(draft_token_ids, sampled_token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
