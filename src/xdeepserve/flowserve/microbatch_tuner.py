"""MicrobatchTuner: into how many microbatches a step is cut, from measured times.

Two microbatches let attention and experts compute at the same time, but make matrix products
smaller; which weighs more depends on model, batch size and machine. So both are measured, by size
of the step, and the faster one is used; now and then the other is tried again.
"""

from __future__ import annotations

from typing import Final

MIN_TOKENS: Final = 4
"""Smaller steps are never cut."""

NUM_TRIALS: Final = 3
"""Steps of each kind that are measured before anything is decided."""

RETRY_INTERVAL: Final = 64
"""Steps between two trials of what was slower."""

WEIGHT: Final = 0.25
"""Of the latest measurement in the running mean."""


class _Arm:
    """What is known of one number of microbatches at one size."""

    __slots__ = ("num_samples", "s_per_token")

    def __init__(self) -> None:
        self.num_samples = 0
        self.s_per_token = 0.0

    def add(self, s_per_token: float) -> None:
        self.num_samples += 1
        weight = max(WEIGHT, 1 / self.num_samples)
        self.s_per_token += weight * (s_per_token - self.s_per_token)


class MicrobatchTuner:
    """Thread: the step loop. Tokens do not depend on the choice."""

    def __init__(self, max_microbatches: int = 2) -> None:
        self._counts = range(1, max_microbatches + 1)
        self._arms: dict[int, dict[int, _Arm]] = {}
        self._num_steps = 0

    def choose(self, *, num_tokens: int, num_seqs: int) -> int:
        """How many parts the next step is cut into."""
        if num_tokens < MIN_TOKENS or num_seqs < 2:
            return 1
        self._num_steps += 1
        arms = self._arms_of(num_tokens)
        rarest = min(self._counts, key=lambda count: arms[count].num_samples)
        if arms[rarest].num_samples < NUM_TRIALS or self._num_steps % RETRY_INTERVAL == 0:
            return rarest
        return min(self._counts, key=lambda count: arms[count].s_per_token)

    def record(self, *, num_tokens: int, count: int, duration_s: float) -> None:
        """A step of `num_tokens` tokens in `count` parts took so long."""
        self._arms_of(num_tokens)[count].add(duration_s / num_tokens)

    def _arms_of(self, num_tokens: int) -> dict[int, _Arm]:
        """Steps of about equal size share what is known: from a power of two to the next."""
        size = num_tokens.bit_length()
        return self._arms.setdefault(size, {count: _Arm() for count in self._counts})
