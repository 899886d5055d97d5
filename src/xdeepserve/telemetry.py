"""Request timing: one record per request, the field's metrics derived from it (seconds)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class RequestTimeline:
    """Monotonic times of one request, all from one process's clock.

    TTFT, TPOT and E2E follow the usual definitions; each is None until it can be known.
    """

    arrived_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_output_tokens: int = 0

    def on_tokens(self, *, now_s: float, count: int) -> None:
        """Record that `count` output tokens reached the client side at `now_s`."""
        if count <= 0:
            return
        if self.first_token_s is None:
            self.first_token_s = now_s
        self.last_token_s = now_s
        self.num_output_tokens += count

    @property
    def ttft_s(self) -> float | None:
        """First token minus arrival."""
        return None if self.first_token_s is None else self.first_token_s - self.arrived_s

    @property
    def tpot_s(self) -> float | None:
        """(last token - first token) / (output tokens - 1); None below two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.num_output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.num_output_tokens - 1)
