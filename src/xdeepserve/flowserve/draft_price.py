"""DraftPrice: what checking one draft costs, in tokens that plain decoding makes meanwhile.

    plain step of B sequences:      B tokens in s * B seconds     (s measured, per B)
    the same with D drafts:         B + A tokens in s * B + x seconds
    worth it when                   A / D  >  x / (s * D)         the price

A machine that waits for memory checks drafts almost for nothing; one that is busy computing pays a
whole token for each. Both times are measured where decoding runs, and measured again now and then.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

NUM_TRIALS: Final = 3
"""Steps of each kind that are measured before anything is decided."""

RETRY_INTERVAL: Final = 64
"""Decode steps between two without drafts, which keep `s` fresh."""

WINDOW: Final = 15
"""Plain steps that count; their median bears the machine's hiccups."""

WEIGHT: Final = 1 / 16
"""Of the latest step with drafts in the running means."""

MAX_SAMPLE: Final = 3.0
"""Tokens per draft; more in one step is a hiccup, not a price."""


class _Excess:
    """Running means, over steps with drafts, of their number and of the plain tokens they cost."""

    __slots__ = ("num_drafts", "num_steps", "tokens")

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_drafts = 0.0
        self.tokens = 0.0

    def add(self, num_drafts: int, tokens: float) -> None:
        bounded = min(max(tokens, -num_drafts), MAX_SAMPLE * num_drafts)
        self.num_steps += 1
        weight = max(WEIGHT, 1 / self.num_steps)
        self.num_drafts += weight * (num_drafts - self.num_drafts)
        self.tokens += weight * (bounded - self.tokens)


class DraftPrice:
    """Prices by number of decoding sequences. Thread: the step loop."""

    def __init__(self) -> None:
        # By number of sequences: at most max_num_seqs entries.
        self._plain: dict[int, deque[float]] = {}
        # By order of magnitude of the number of sequences.
        self._excess: dict[int, _Excess] = {}
        self._num_steps = 0

    def quote(self, num_seqs: int) -> float | None:
        """Tokens that a draft costs in the next step; None = measure a step without any."""
        self._num_steps += 1
        plain = self._plain.get(num_seqs, ())
        if len(plain) < NUM_TRIALS or self._num_steps % RETRY_INTERVAL == 0:
            return None
        excess = self._excess.get(num_seqs.bit_length())
        if excess is None or excess.num_steps < NUM_TRIALS:
            return 0.0
        return max(excess.tokens / excess.num_drafts, 0.0)

    def record(self, *, num_seqs: int, num_drafts: int, duration_s: float) -> None:
        """A step of nothing but decoding took so long."""
        if duration_s <= 0:  # a clock that stands still measures nothing
            return
        if num_drafts == 0:
            times = self._plain.setdefault(num_seqs, deque(maxlen=WINDOW))
            times.append(duration_s / num_seqs)
            return
        plain = self._plain.get(num_seqs)
        if plain:
            excess = self._excess.setdefault(num_seqs.bit_length(), _Excess())
            excess.add(num_drafts, duration_s / median(plain) - num_seqs)
