"""Sampler: logits and per-request parameters -> token ids and log probabilities.

    logits --> penalties, bias, masks (only on rows that ask) --> ops.sample --> ids
       \\--> ops.top_logprobs (only rows that ask; raw logits, before any adjustment)

Rows that want only the largest logit have their id from the LM head and never come here.
Adjustments touch a few entries of a row in place and are taken back after sampling, so no copy of
the logits is ever made. Randomness is a pure function of (seed, position).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from xdeepserve.messages import GREEDY_TEMPERATURE, SamplingParams, TokenLogprobs
from xdeepserve.ops import F32, I32, Ops, Penalties, SamplingBatch
from xdeepserve.ops.rng import uniform

_SEED_MASK = (1 << 64) - 1


class SampleRow(NamedTuple):
    """What the sampler must know of one sequence.

    A named tuple, because one is made for every row of every step.

    Attributes:
        params: the request's parameters.
        token_ids: int32 array, prompt then output; what follows `position` does not count.
            Borrowed for the call.
        num_prompt_tokens: how many of them are prompt.
        position: index of the token to be chosen, counted from the start of the prompt; with the
            seed it determines the random number.
    """

    params: SamplingParams
    token_ids: array[int]
    num_prompt_tokens: int
    position: int

    @property
    def prompt_token_ids(self) -> I32:
        """A view; drop it before the array grows."""
        return np.frombuffer(self.token_ids, np.int32)[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> I32:
        """The tokens chosen so far; a view likewise."""
        return np.frombuffer(self.token_ids, np.int32)[self.num_prompt_tokens : self.position]


@dataclass(frozen=True, slots=True)
class SampleResult:
    """token_ids: one per row; logprobs: one per row, None where not asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]


@dataclass(frozen=True, slots=True)
class HeadOrder:
    """The order in which the LM head takes the rows of a step.

    Attributes:
        row_idxs: a permutation of the rows; those that need no logits come first.
        num_greedy: how many need none.
    """

    row_idxs: Sequence[int]
    num_greedy: int

    @classmethod
    def of(cls, rows: Sequence[SampleRow]) -> HeadOrder:
        """Otherwise in the order of `rows`."""
        needs_logits = [_needs_logits(row) for row in rows]
        num_greedy = needs_logits.count(False)
        if num_greedy in (0, len(rows)):
            return cls(range(len(rows)), num_greedy)
        return cls(sorted(range(len(rows)), key=needs_logits.__getitem__), num_greedy)

    def arrange(self, states: F32) -> F32:
        """The rows of `states` [B, ...] in this order; `states` itself where it is theirs."""
        return states if isinstance(self.row_idxs, range) else states[self.row_idxs]


class Sampler:
    """Chooses the next token of every row of a step. Stateless between steps."""

    def __init__(self, ops: Ops, *, eos_token_ids: tuple[int, ...]) -> None:
        self._ops = ops
        self._eos_token_ids = eos_token_ids

    def sample(self, logits: F32, rows: Sequence[SampleRow]) -> SampleResult:
        """Sample one token per row.

        Order: repetition, frequency and presence penalty, logit_bias, min_tokens mask,
        temperature, top_k, top_p, min_p.

        Args:
            logits: [B, V]; written to during the call, as before afterwards.
            rows: one per row of logits.
        """
        undo = []
        for row_idx, row in enumerate(rows):
            if _is_adjusted(row):
                undo.append((logits[row_idx], self._adjust(logits[row_idx], row)))
        token_ids = self._ops.sample(logits, _sampling_batch(rows))
        for row_logits, changes in undo:
            for ids, raw in reversed(changes):
                row_logits[ids] = raw
        return SampleResult(token_ids.tolist(), self._logprobs(logits, token_ids, rows))

    def complete(
        self, order: HeadOrder, greedy_ids: I32, logits: F32, rows: Sequence[SampleRow]
    ) -> SampleResult:
        """The tokens of all rows: those of the LM head, and one sampled for each row left.

        Args:
            order: of the rows.
            greedy_ids: [order.num_greedy], as the head gave them.
            logits: [B - order.num_greedy, V] of the others, in `order`; see `sample`.
            rows: all of them, in their own order.
        """
        left = order.row_idxs[order.num_greedy :]
        if not left:
            return SampleResult(greedy_ids.tolist(), [None] * len(rows))
        sampled = self.sample(logits, [rows[idx] for idx in left])
        token_ids: list[int] = [0] * len(rows)
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        for idx, token_id in zip(order.row_idxs, greedy_ids.tolist(), strict=False):
            token_ids[idx] = token_id
        for at, idx in enumerate(left):
            token_ids[idx], logprobs[idx] = sampled.token_ids[at], sampled.logprobs[at]
        return SampleResult(token_ids, logprobs)

    def _adjust(self, logits: F32, row: SampleRow) -> list[tuple[I32, F32]]:
        """Adjust a row [V] in place; (ids, the logits they had) of each change, in order."""
        params = row.params
        changes = []
        if _is_penalized(params):
            is_repetition = params.repetition_penalty != 1.0
            prompt = row.prompt_token_ids if is_repetition else np.empty(0, np.int32)
            penalties = Penalties(
                repetition=params.repetition_penalty,
                frequency=params.frequency_penalty,
                presence=params.presence_penalty,
            )
            changes.append(self._ops.penalize(logits, prompt, row.output_token_ids, penalties))
        if params.logit_bias:
            biased = np.fromiter(params.logit_bias, np.int32, len(params.logit_bias))
            changes.append((biased, logits[biased]))
            logits[biased] += np.fromiter(params.logit_bias.values(), np.float32, biased.size)
        masked = self._masked_ids(row)
        changes.append((masked, logits[masked]))
        logits[masked] = -np.inf
        return changes

    def _masked_ids(self, row: SampleRow) -> I32:
        """Ids that would end the sequence, while it is shorter than min_tokens."""
        params = row.params
        if row.position - row.num_prompt_tokens >= params.min_tokens:
            return np.empty(0, np.int32)
        eos = () if params.ignore_eos else self._eos_token_ids
        return np.array(sorted({*eos, *params.stop_token_ids}), np.int32)

    def _logprobs(
        self, logits: F32, token_ids: I32, rows: Sequence[SampleRow]
    ) -> list[TokenLogprobs | None]:
        results: list[TokenLogprobs | None] = [None] * len(rows)
        asking = [idx for idx, row in enumerate(rows) if row.params.logprobs is not None]
        if not asking:
            return results
        wanted = [rows[idx].params.logprobs or 0 for idx in asking]
        chosen, top_ids, top = self._ops.top_logprobs(
            logits[asking], token_ids[asking], max(wanted)
        )
        for at, (idx, num_top) in enumerate(zip(asking, wanted, strict=True)):
            results[idx] = TokenLogprobs(
                float(chosen[at]), top_ids[at, :num_top].tolist(), top[at, :num_top].tolist()
            )
        return results


def _needs_logits(row: SampleRow) -> bool:
    params = row.params
    return (
        params.temperature >= GREEDY_TEMPERATURE or params.logprobs is not None or _is_adjusted(row)
    )


def _is_adjusted(row: SampleRow) -> bool:
    params = row.params
    return bool(
        params.min_tokens > row.position - row.num_prompt_tokens
        or params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
    )


def _is_penalized(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    )


def _sampling_batch(rows: Sequence[SampleRow]) -> SamplingBatch:
    params = [row.params for row in rows]
    greedy = np.array([p.is_greedy for p in params], dtype=bool)
    temperature = np.array([p.temperature for p in params], dtype=np.float32)
    random = np.zeros(len(rows), np.float64)
    if not greedy.all():
        seeds = np.array([p.seed & _SEED_MASK for p in params], dtype=np.uint64)
        random = uniform(seeds, np.array([row.position for row in rows], dtype=np.int64))
    return SamplingBatch(
        temperature=np.where(greedy, np.float32(0), temperature),
        top_k=np.array([p.top_k for p in params], dtype=np.int32),
        top_p=np.array([p.top_p for p in params], dtype=np.float32),
        min_p=np.array([p.min_p for p in params], dtype=np.float32),
        uniform=random,
    )
