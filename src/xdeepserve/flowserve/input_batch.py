"""From a plan to arrays: ForwardBatch of one step or of one microbatch of it.

Rebuilt whole in every step: one pass over the requests in plain Python, whose loops run over
requests and blocks, never over tokens. That takes less time than numpy's calls would, which find
their code evicted from the caches by the weights of the step before.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from xdeepserve.flowserve.step import ScheduledRequest
from xdeepserve.models.batch import ForwardBatch
from xdeepserve.ops import I32, AttentionBatch

_NO_BLOCK = b"\xff\xff\xff\xff"  # -1 as int32


def build_forward_batch(scheduled: Sequence[ScheduledRequest], block_size: int) -> ForwardBatch:
    """Arrays for the given share of a plan, in its order.

    Args:
        scheduled: at least one request.
        block_size: tokens per KV block.
    """
    token_ids, positions, slots = array("i"), array("i"), array("i")
    query_start, seq_lens, logits_rows = array("i", [0]), array("i"), array("i")
    tables: list[array[int]] = []
    num_rows = 0
    for item in scheduled:
        first = item.num_computed_tokens
        stop = first + item.num_rows
        tables.append(item.block_ids[: -(-stop // block_size)])
        if stop - first == 1:
            token_ids.append(item.token_ids[first])
            positions.append(first)
            slots.append(item.block_ids[first // block_size] * block_size + first % block_size)
        else:
            token_ids += item.token_ids[first : first + item.num_scheduled_tokens]
            token_ids.extend(item.draft_token_ids)
            positions.extend(range(first, stop))
            _add_slots(slots, item.block_ids, first, stop, block_size)
        seq_lens.append(stop)
        num_rows += stop - first
        query_start.append(num_rows)
        if item.samples:
            logits_rows.extend(range(num_rows - 1 - len(item.draft_token_ids), num_rows))
    return ForwardBatch(
        token_ids=_ints(token_ids),
        attention=AttentionBatch(
            query_start=_ints(query_start),
            seq_lens=_ints(seq_lens),
            block_tables=_padded(tables),
            positions=_ints(positions),
            slot_mapping=_ints(slots),
        ),
        logits_rows=_ints(logits_rows),
    )


def _ints(values: array[int] | bytes) -> I32:
    """The same memory as int32."""
    return np.frombuffer(values, np.int32)


def _add_slots(
    slots: array[int], block_ids: Sequence[int], first: int, stop: int, block_size: int
) -> None:
    """Append the slots of positions [first, stop)."""
    for block_idx in range(first // block_size, -(-stop // block_size)):
        # What slot the block's position would have, were it 0.
        shift = (block_ids[block_idx] - block_idx) * block_size
        start = max(first, block_idx * block_size)
        end = min(stop, (block_idx + 1) * block_size)
        slots.extend(range(shift + start, shift + end))


def _padded(tables: Sequence[array[int]]) -> I32:
    """[B, max_blocks] of B block tables, padded with -1."""
    width = max(map(len, tables))
    parts = [part for table in tables for part in (table, _NO_BLOCK * (width - len(table)))]
    return _ints(b"".join(parts)).reshape(len(tables), width)


def split_microbatches(
    scheduled: Sequence[ScheduledRequest], count: int
) -> list[Sequence[ScheduledRequest]]:
    """At most `count` consecutive non-empty parts with about equally many tokens each."""
    if count <= 1 or len(scheduled) <= 1:
        return [scheduled]
    ends = np.cumsum([s.num_rows for s in scheduled])
    goals = ends[-1] * np.arange(1, count) / count
    cuts = np.abs(ends[:-1, None] - goals).argmin(axis=0) + 1
    borders = [0, *sorted(set(cuts.tolist())), len(scheduled)]
    return [scheduled[a:b] for a, b in pairwise(borders)]
