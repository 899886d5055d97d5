"""From a plan to arrays: ForwardBatch of one step or of one microbatch of it.

Python loops run over requests, never over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from xdeepserve.flowserve.step import ScheduledRequest
from xdeepserve.models.batch import ForwardBatch
from xdeepserve.ops import I32, AttentionBatch


def build_forward_batch(scheduled: Sequence[ScheduledRequest], block_size: int) -> ForwardBatch:
    """Arrays for the given share of a plan, in its order.

    Args:
        scheduled: at least one request.
        block_size: tokens per KV block.
    """
    num_rows = len(scheduled)
    starts = np.fromiter((s.num_computed_tokens for s in scheduled), np.int32, num_rows)
    counts = np.fromiter((s.num_rows for s in scheduled), np.int32, num_rows)
    query_start = np.zeros(num_rows + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    seq_lens = starts + counts
    row_of_token = np.repeat(np.arange(num_rows, dtype=np.int32), counts)
    positions = np.arange(query_start[-1], dtype=np.int32)
    positions += (starts - query_start[:-1])[row_of_token]
    block_tables = _block_tables(scheduled, seq_lens, block_size)
    block_idx, offset = np.divmod(positions, np.int32(block_size))
    slot_mapping = block_tables[row_of_token, block_idx] * np.int32(block_size) + offset
    return ForwardBatch(
        token_ids=_token_ids(scheduled, query_start),
        attention=AttentionBatch(query_start, seq_lens, block_tables, positions, slot_mapping),
        logits_rows=_logits_rows(scheduled, query_start[1:]),
    )


def _token_ids(scheduled: Sequence[ScheduledRequest], query_start: I32) -> I32:
    """[T] ids to compute."""
    num_tokens = int(query_start[-1])
    if num_tokens == len(scheduled):
        return np.fromiter(
            (s.token_ids[s.num_computed_tokens] for s in scheduled), np.int32, num_tokens
        )
    token_ids = np.empty(num_tokens, np.int32)
    stop = 0
    for item in scheduled:
        start, stop = stop, stop + item.num_scheduled_tokens
        known = np.frombuffer(item.token_ids, np.int32)
        first = item.num_computed_tokens
        token_ids[start:stop] = known[first : first + item.num_scheduled_tokens]
        start, stop = stop, stop + len(item.draft_token_ids)
        token_ids[start:stop] = item.draft_token_ids
    return token_ids


def _logits_rows(scheduled: Sequence[ScheduledRequest], ends: I32) -> I32:
    """Of each request that samples its last token's row and those of its drafts.

    Args:
        scheduled: B requests.
        ends: [B] row behind the last one of each.
    """
    wanted = (1 + len(s.draft_token_ids) if s.samples else 0 for s in scheduled)
    counts = np.fromiter(wanted, np.int32, len(scheduled))
    # Row r of the result belongs to the request whose rows end at ends[b].
    rows: I32 = np.repeat(ends - np.cumsum(counts, dtype=np.int32), counts)
    rows += np.arange(len(rows), dtype=np.int32)
    return rows


def _block_tables(scheduled: Sequence[ScheduledRequest], seq_lens: I32, block_size: int) -> I32:
    """[B, max_blocks], as wide as this step reads, padded with -1."""
    num_blocks = (-(-seq_lens // block_size)).tolist()
    tables = np.full((len(scheduled), max(num_blocks)), -1, np.int32)
    for row, item, width in zip(tables, scheduled, num_blocks, strict=True):
        row[:width] = np.frombuffer(item.block_ids, np.int32, width)
    return tables


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
