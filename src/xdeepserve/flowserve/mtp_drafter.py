"""MtpDrafter: drafts by the model's MTP layer, right behind the step that its states come from.

    main step      rows of positions p ..... n-2, n-1    new ids t(n) (accepted drafts before it)
    MTP pass 1     the same positions, ids one further   KV of the layer; last row -> draft t(n+1)
    MTP pass 2 ..  position n, id t(n+1) ...             its own state and guess -> draft t(n+2)

Each draft is sampled as its position will be: same parameters, seed and position, so that sampled
requests accept about as well as greedy ones. What pass 2 and later write is written again when the
main model gets there. Positions that a step skipped leave gaps in the layer's cache, which cost
acceptance and nothing else.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from xdeepserve.flowserve.input_batch import build_forward_batch
from xdeepserve.flowserve.step import ScheduledRequest
from xdeepserve.models.mtp import MtpUnit
from xdeepserve.models.sampler import Sampler, SampleRow
from xdeepserve.ops import F32, I32, KVLayer


@dataclass(slots=True)
class _Sequence:
    """One request: all its ids, those of this step and the drafts included."""

    item: ScheduledRequest
    token_ids: array[int]
    drafts: list[int] = field(default_factory=list)

    def share(self, first: int, count: int) -> ScheduledRequest:
        """Rows of `count` positions from `first` on, with the ids behind them."""
        return self.item._replace(
            token_ids=self.token_ids[1:],
            num_computed_tokens=first,
            num_scheduled_tokens=count,
            draft_token_ids=(),
        )

    def sample_row(self) -> SampleRow:
        return SampleRow(
            params=msgspec.structs.replace(self.item.params, logprobs=None),
            token_ids=self.token_ids,
            num_prompt_tokens=self.item.num_prompt_tokens,
            position=len(self.token_ids),
        )


class MtpDrafter:
    """Owner of the MTP layer's KV. Thread: the step loop."""

    def __init__(self, unit: MtpUnit, *, kv: KVLayer, sampler: Sampler, max_positions: int) -> None:
        """Make a drafter.

        Args:
            unit: the model's MTP layer.
            kv: its cache, with as many blocks as the main layers have.
            sampler: the executor's.
            max_positions: what the model's rotary table covers.
        """
        self._unit = unit
        self._kv = kv
        self._sampler = sampler
        self._max_positions = max_positions

    def draft(
        self,
        scheduled: Sequence[ScheduledRequest],
        hidden_states: F32,
        new_token_ids: Sequence[tuple[int, ...]],
    ) -> tuple[tuple[int, ...], ...]:
        """Drafts for the next step, aligned with `scheduled`.

        Args:
            scheduled: the step's requests, in the order of its rows.
            hidden_states: [T, H] of the step, before the final norm.
            new_token_ids: what each request got.
        """
        sequences: list[_Sequence | None] = []
        shares: list[ScheduledRequest] = []
        rows: list[I32] = []
        start = 0
        for item, new in zip(scheduled, new_token_ids, strict=True):
            sequence = None
            if item.num_drafts_wanted:
                sequence = _Sequence(item, item.token_ids + array("i", new))
                count = item.num_scheduled_tokens + max(len(new) - 1, 0)
                shares.append(sequence.share(item.num_computed_tokens, count))
                rows.append(np.arange(start, start + count, dtype=np.int32))
            sequences.append(sequence)
            start += item.num_rows
        if shares:
            states = self._unit.main_states(hidden_states[np.concatenate(rows)])
            sampling = [s for s in sequences if s is not None and s.item.samples]
            self._extend(sampling, shares, states)
        return tuple(() if s is None else tuple(s.drafts) for s in sequences)

    def _extend(
        self, sampling: list[_Sequence], shares: Sequence[ScheduledRequest], states: F32
    ) -> None:
        """Pass by pass: compute the shares, sample a draft for each request that still wants one.

        Args:
            sampling: the requests of the shares that sample, in order.
            shares: rows of the first pass.
            states: [T, H] of these rows.
        """
        while shares:
            batch = build_forward_batch(shares, self._kv.block_size)
            states = self._unit(states, batch, self._kv)
            if not sampling:
                return
            logits = self._unit.head(states, batch.logits_rows)
            sampled = self._sampler.sample(logits, [s.sample_row() for s in sampling])
            for sequence, token_id in zip(sampling, sampled.token_ids, strict=True):
                sequence.token_ids.append(token_id)
                sequence.drafts.append(token_id)
            keep = [self._has_room(sequence) for sequence in sampling]
            states = states[batch.logits_rows[keep]]
            sampling = [s for s, is_kept in zip(sampling, keep, strict=True) if is_kept]
            shares = [s.share(len(s.token_ids) - 2, 1) for s in sampling]

    def _has_room(self, sequence: _Sequence) -> bool:
        """Whether another draft is wanted, and its row has a KV slot and a rotation."""
        item, position = sequence.item, len(sequence.token_ids) - 2
        num_slots = len(item.block_ids) * self._kv.block_size
        is_wanted = len(sequence.drafts) < item.num_drafts_wanted
        return is_wanted and position < min(num_slots, self._max_positions)
