"""ExpertShare: how many of an exchange's experts the asker computes itself instead of waiting.

    answer not there yet when it is wanted --> take more next time
    answer already there                   --> take less next time

An attention worker has every expert mapped, so time that it would spend waiting can be spent on
their share of the work. What a token is does not depend on who computes it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from xdeepserve.ops import I32

MAX_SHARE: Final = 0.9
"""Something is always asked of others, or nothing more would be learned of their speed."""

STEP: Final = 1 / 128
"""Change of the share per exchange: a step of the model has one per layer."""

READING_ROWS: Final = 5
"""Reading an expert's weights costs about as much as computing so many rows with them."""


class ExpertShare:
    """Thread: the step loop. Exchanges of about equal size share what is known."""

    def __init__(self) -> None:
        self._shares: dict[int, float] = {}

    def share(self, num_rows: int) -> float:
        """Part of the experts' work that the asker takes of an exchange of `num_rows` rows."""
        return self._shares.get(num_rows.bit_length(), 0.0)

    def choose(self, topk_ids: I32, num_experts: int) -> NDArray[np.bool_] | None:
        """The experts that the asker computes.

        Args:
            topk_ids: [T, K] in [0, num_experts), -1 = skip.
            num_experts: E.

        Returns:
            [E], never all that are asked for; None when there are none to take.
        """
        share = self.share(len(topk_ids))
        if share == 0.0:
            return None
        flat = topk_ids.ravel()
        counts = np.bincount(flat[flat >= 0], minlength=num_experts)
        costs = np.where(counts > 0, counts + READING_ROWS, 0)
        order = np.argsort(costs, kind="stable")
        ends = np.cumsum(costs[order])
        middles = ends - costs[order] / 2
        num_taken = int(np.searchsorted(middles, share * ends[-1], side="right"))
        taken = order[: min(num_taken, num_experts - 1)]
        if not counts[taken].any():
            return None
        is_taken = np.zeros(num_experts, np.bool_)
        is_taken[taken] = True
        return is_taken

    def learn(self, num_rows: int, *, was_ready: bool) -> None:
        """The others' answer was there when it was wanted, or had to be waited for."""
        share = self.share(num_rows) + (-STEP if was_ready else STEP)
        self._shares[num_rows.bit_length()] = min(max(share, 0.0), MAX_SHARE)
