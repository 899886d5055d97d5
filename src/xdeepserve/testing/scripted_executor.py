"""ScriptedExecutor: an Executor without a model, whose tokens a test can predict."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

from xdeepserve.flowserve.step import ScheduledRequest, StepPlan, StepResult, num_confirmed
from xdeepserve.messages import TokenLogprobs

Script = Callable[[ScheduledRequest], int]

_FIRST_ID = 3
_NUM_IDS = 97


def next_scripted_id(token_ids: Sequence[int]) -> int:
    """The default script: a function of the sequence's last id and length, in [3, 100)."""
    return _FIRST_ID + (token_ids[-1] * 31 + len(token_ids) * 7) % _NUM_IDS


def scripted_output(prompt_token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """What the default script answers to a prompt."""
    token_ids = list(prompt_token_ids)
    for _ in range(num_tokens):
        token_ids.append(next_scripted_id(token_ids))
    return token_ids[len(prompt_token_ids) :]


def _default_script(item: ScheduledRequest) -> int:
    return next_scripted_id(item.token_ids)


class ScriptedExecutor:
    """Answers every sampling request with `script(item)` and logprob -0.5.

    It keeps a token per KV slot, as a model keeps keys, and checks before it answers that the
    slots of the whole context hold the request's own tokens: a scheduler or prefix cache that
    mixes blocks up is caught in the step where it happens.

    Attributes:
        plans: every plan executed, newest last; only counts are safe to read later.
        fail_with: raise this in the next step.
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, script: Script = _default_script
    ) -> None:
        self.plans: list[StepPlan] = []
        self.fail_with: Exception | None = None
        self.is_closed = False
        self._block_size = block_size
        self._slots = [-1] * (num_blocks * block_size)
        self._script = script

    def warm_up(self) -> None:
        """Nothing to touch."""

    def execute(self, *, plan: StepPlan) -> StepResult:
        """See Executor.execute.

        Raises:
            AssertionError: a KV slot of a context does not hold the context's token.
        """
        if self.fail_with is not None:
            raise self.fail_with
        self.plans.append(plan)
        for item in plan.scheduled:
            self._write(item)
        for item in plan.scheduled:
            self._check_context(item)
        token_ids = tuple(self._answer(i) if i.samples else () for i in plan.scheduled)
        rows = zip(plan.scheduled, token_ids, strict=True)
        logprobs = tuple(_logprobs(i, len(ids)) for i, ids in rows)
        rows = zip(plan.scheduled, token_ids, strict=True)
        drafts = tuple(self._guess(i, ids) if i.samples else () for i, ids in rows)
        return StepResult(token_ids, logprobs, drafts)

    def _guess(self, item: ScheduledRequest, new: tuple[int, ...]) -> tuple[int, ...]:
        """What a perfect MTP layer would draft."""
        history = item.token_ids + array("i", new)
        start = len(history)
        for _ in range(item.num_drafts_wanted):
            history.append(self._script(item._replace(token_ids=history)))
        return tuple(history[start:])

    def _answer(self, item: ScheduledRequest) -> tuple[int, ...]:
        """The script's ids as far as they confirm the drafts, and one more."""
        drafts = item.draft_token_ids
        sampled = []
        for num_known in range(len(drafts) + 1):
            history = item.token_ids + array("i", drafts[:num_known])
            sampled.append(self._script(item._replace(token_ids=history)))
        return tuple(sampled[: 1 + num_confirmed(drafts, sampled)])

    def close(self) -> None:
        """Remember that it was called."""
        self.is_closed = True

    def _slot(self, item: ScheduledRequest, position: int) -> int:
        block_idx, offset = divmod(position, self._block_size)
        return item.block_ids[block_idx] * self._block_size + offset

    def _write(self, item: ScheduledRequest) -> None:
        token_ids = item.token_ids + array("i", item.draft_token_ids)
        start = item.num_computed_tokens
        for position in range(start, start + item.num_rows):
            self._slots[self._slot(item, position)] = token_ids[position]

    def _check_context(self, item: ScheduledRequest) -> None:
        for position in range(item.num_computed_tokens + item.num_scheduled_tokens):
            found = self._slots[self._slot(item, position)]
            assert found == item.token_ids[position], (
                f"{item.request_id}: KV of position {position} belongs to token {found}, "
                f"not {item.token_ids[position]}"
            )


def _logprobs(item: ScheduledRequest, count: int) -> tuple[TokenLogprobs, ...] | None:
    if item.params.logprobs is None or count == 0:
        return None
    return (TokenLogprobs(-0.5, [], []),) * count
