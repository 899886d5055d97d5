"""Speculator: which drafts are worth checking, by measured price and measured acceptance.

A draft is accepted iff it equals the id sampled at its position, so drafts decide when tokens come
and never which (law 1). What is left to decide is whether checking them pays.
"""

from __future__ import annotations

from array import array
from typing import Final, Protocol

from xdeepserve.flowserve.draft_price import DraftPrice

REQUEST_MEMORY: Final = 0.9
"""What a request's older drafts weigh after one more check; a request's text changes its nature."""

GROUP_MEMORY: Final = 0.99
"""The same for all requests together."""

PRIOR_DRAFTS: Final = 4.0
"""Weight, in drafts, of what all requests showed in the judgement of one."""

FIRST_RETRY: Final = 32
"""Refusals before a request's luck is tried again with one draft; doubles while it fails."""

MAX_RETRY: Final = 1024


class Proposer(Protocol):
    """Guesses continuations."""

    def propose(self, token_ids: array[int], *, limit: int) -> tuple[int, ...]:
        """At most `limit` ids that may follow `token_ids`; often none."""
        ...


class Acceptance:
    """Fading counts of drafts and of those accepted."""

    __slots__ = ("accepted", "drafted")

    def __init__(self, *, accepted: float = 0.0, drafted: float = 0.0) -> None:
        self.accepted = accepted
        self.drafted = drafted

    def add(self, num_drafts: int, num_accepted: int, *, memory: float) -> None:
        """Count the drafts of one step."""
        self.drafted = memory * self.drafted + num_drafts
        self.accepted = memory * self.accepted + num_accepted


class DraftRecord:
    """What one request's drafts came to. Opaque to the scheduler; changed by `Speculator` alone."""

    __slots__ = ("acceptance", "num_refused", "pending", "retry_after")

    def __init__(self) -> None:
        self.acceptance = Acceptance()
        # What the model guessed to come next; of the last token only.
        self.pending: tuple[int, ...] = ()
        self.num_refused = 0
        self.retry_after = FIRST_RETRY


class Speculator:
    """Proposer and judge of drafts of one DP group. Thread: the step loop."""

    def __init__(self, proposer: Proposer | None, *, num_speculative_tokens: int) -> None:
        """Start without experience, hence hopeful.

        Args:
            proposer: where drafts come from; None = the model makes them in its steps.
            num_speculative_tokens: most drafts of a request in a step.
        """
        self._proposer = proposer
        self._max_drafts = num_speculative_tokens
        self._price = DraftPrice()
        self._acceptance = Acceptance(accepted=1.0, drafted=1.0)
        self._quote: float | None = None

    def begin_step(self, *, num_seqs: int) -> bool:
        """Prepare a step of `num_seqs` decoding requests; False = it takes no drafts."""
        self._quote = self._price.quote(num_seqs)
        return self._quote is not None

    def propose(self, record: DraftRecord, token_ids: array[int], *, limit: int) -> tuple[int, ...]:
        """Drafts of one request for the step begun last; empty when none are worth it.

        Args:
            record: of this request, from its start on.
            token_ids: its ids so far.
            limit: most drafts that there is room for.
        """
        limit = min(limit, self._max_drafts)
        if limit < 1:
            return ()
        if not self._is_worth_it(record):
            record.num_refused += 1
            if record.num_refused < record.retry_after:
                return ()
            limit = 1
        if self._proposer is None:
            return record.pending[:limit]
        return self._proposer.propose(token_ids, limit=limit)

    def num_wanted(self, record: DraftRecord) -> int:
        """Drafts that the model should make of this request for the next step."""
        if self._proposer is not None:
            return 0
        is_retry = record.num_refused >= record.retry_after
        return self._max_drafts if is_retry or self._is_worth_it(record) else 0

    def receive(self, record: DraftRecord, drafts: tuple[int, ...]) -> None:
        """Take what the model guessed to follow the request's last token."""
        record.pending = drafts

    def _is_worth_it(self, record: DraftRecord) -> bool:
        common, own = self._acceptance, record.acceptance
        prior = PRIOR_DRAFTS * common.accepted / common.drafted
        return (own.accepted + prior) / (own.drafted + PRIOR_DRAFTS) >= (self._quote or 0.0)

    def record_drafts(self, record: DraftRecord, *, num_drafts: int, num_accepted: int) -> None:
        """Learn from drafts that were checked."""
        record.acceptance.add(num_drafts, num_accepted, memory=REQUEST_MEMORY)
        self._acceptance.add(num_drafts, num_accepted, memory=GROUP_MEMORY)
        if record.num_refused >= record.retry_after:
            failed = num_accepted == 0
            record.retry_after = min(2 * record.retry_after, MAX_RETRY) if failed else FIRST_RETRY
            record.num_refused = 0

    def record_step(self, *, num_seqs: int, num_drafts: int, duration_s: float) -> None:
        """Learn from the time of a step of nothing but decoding; of drafting too, if it had any."""
        self._price.record(num_seqs=num_seqs, num_drafts=num_drafts, duration_s=duration_s)
