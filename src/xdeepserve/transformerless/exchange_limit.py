"""How long an exchange waits at most; below it no group may be killed for its peers' silence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from xdeepserve.clock import SYSTEM_CLOCK, Clock

EXCHANGE_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class ExchangeLimit:
    """One deadline for all waits of an exchange, posts, both legs and moves.

    Attributes:
        timeout_s: from the dispatch until what ranks that live have not answered is computed by
            the asker.
        clock: of the deadlines.
    """

    timeout_s: float = EXCHANGE_TIMEOUT_S
    clock: Clock = SYSTEM_CLOCK

    def deadline_s(self) -> float:
        """Of an exchange that begins now."""
        return self.clock.monotonic() + self.timeout_s

    def left_s(self, deadline_s: float) -> float:
        """Time until then; at 0 a wait still takes what is there."""
        return max(0.0, deadline_s - self.clock.monotonic())


DEFAULT_LIMIT: Final = ExchangeLimit()
