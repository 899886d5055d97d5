"""The counts of one request that goes on, summed over its choices as their outputs come."""

from __future__ import annotations

from collections.abc import Sequence

from xdeepserve.maas.ledger.billing import Charge
from xdeepserve.maas.ledger.meter import Ending
from xdeepserve.maas.ledger.prices import TokenCounts
from xdeepserve.messages import FinishReason, Usage


class RunningBill:
    """Keeps a charge up to date. A prompt counts once, from the first output of its choices on.

    Args:
        charge: None where nobody pays.
        num_choices: of each prompt; choices are numbered prompt by prompt.
    """

    def __init__(self, charge: Charge | None, *, num_choices: int) -> None:
        self._charge = charge
        self._num_choices = num_choices
        self._prompts: dict[int, Usage] = {}
        self._choices: dict[int, int] = {}
        self._counts = TokenCounts()

    def take(self, index: int, usage: Usage) -> None:
        """Counts of one choice so far; call before its tokens go anywhere."""
        if self._charge is None:
            return
        prompt, choice = divmod(index, self._num_choices)
        before = self._prompts.get(prompt, Usage(0))
        if prompt not in self._prompts or choice == 0:  # whose counts the reply shows, too
            self._prompts[prompt] = usage
        after = self._prompts[prompt]
        new = usage.num_output_tokens - self._choices.get(index, 0)
        self._choices[index] = usage.num_output_tokens
        self._counts = TokenCounts(
            prompt=self._counts.prompt + after.num_prompt_tokens - before.num_prompt_tokens,
            cached=self._counts.cached + after.num_cached_tokens - before.num_cached_tokens,
            completion=self._counts.completion + new,
        )
        self._charge.record(self._counts)

    def close(self, endings: Sequence[str]) -> None:
        """The request is over; `endings` are the finish reasons of its choices. Idempotent."""
        charge, self._charge = self._charge, None  # whatever comes late counts for nobody
        if charge is not None:
            charge.close(self._ending(set(endings)))

    def _ending(self, reasons: set[str]) -> Ending:
        if FinishReason.ERROR in reasons:
            return Ending.ERROR if self._prompts else Ending.REFUSED
        if not reasons or FinishReason.ABORT in reasons:
            return Ending.ABORT
        if len(reasons) > 1:
            return Ending.MIXED
        return Ending[reasons.pop().upper()]
