"""NgramProposer: what came after the sequence's last few ids when they occurred before.

Text that repeats itself or its prompt (edits, quotes, tables, code) is guessed well without any
model. Stateless, so nothing has to follow a request that ends, moves or is preempted.
Source: prompt lookup decoding (Saxena, 2023); reference-copying (arXiv:2304.04487).
"""

from __future__ import annotations

from array import array
from typing import Final

MIN_NGRAM: Final = 2
"""Shorter repetitions are chance."""

MAX_NGRAM: Final = 4
"""The longest suffix looked for; a longer one seldom changes where it is found."""


class NgramProposer:
    """Drafts by looking back: the latest place of the longest suffix that occurred before."""

    def propose(self, token_ids: array[int], *, limit: int) -> tuple[int, ...]:
        """Ids that may follow `token_ids`: `limit` of them, or none where nothing is repeated.

        Args:
            token_ids: int32, the sequence so far.
            limit: most ids wanted, at least one.

        Cost: at most MAX_NGRAM - MIN_NGRAM + 1 searches through 4 * len(token_ids) bytes.
        """
        period = _period(token_ids)
        if period == 0:
            return ()
        # The copy may run into its own output: a sequence in a loop goes on in the loop.
        start = len(token_ids) - period
        tail = token_ids[start : start + limit]
        return tuple(tail[idx % len(tail)] for idx in range(limit))


def _period(token_ids: array[int]) -> int:
    """How far back the longest repeated suffix was seen last; 0 = nowhere."""
    data = token_ids.tobytes()
    period = 0
    for size in range(MIN_NGRAM, MAX_NGRAM + 1):
        found = _find_last(data, size * token_ids.itemsize, token_ids.itemsize)
        if found < 0:
            break
        period = len(token_ids) - size - found
    return period


def _find_last(data: bytes, suffix_bytes: int, width: int) -> int:
    """Index of the last element where the suffix of `data` occurs before its end; -1 = none."""
    suffix = data[len(data) - suffix_bytes :]
    at = data.rfind(suffix, 0, max(len(data) - width, 0)) if len(data) > suffix_bytes else -1
    while at > 0 and at % width:  # between two elements
        at = data.rfind(suffix, 0, at + suffix_bytes - 1)
    return at // width
