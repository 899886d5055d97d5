"""Scheduler: which request gets how many tokens in the next step, and what becomes of the result.

There is no prefill phase and no decode phase: `num_computed_tokens` of each request chases its
`num_tokens` under one token budget. Chunked prefill, prefix hits, resumption after preemption and
decoding are that one rule. Pure Python over ints: no arrays, no clock, no threads.
"""

# size: one owner of the queues; its steps share every field

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xdeepserve.config import EngineConfig
from xdeepserve.errors import ConfigError, IntegrityError, RequestError
from xdeepserve.flowserve.request import Request, RequestStatus
from xdeepserve.flowserve.request_queue import RequestQueue
from xdeepserve.flowserve.speculator import Speculator
from xdeepserve.flowserve.step import ScheduledRequest, StepPlan, StepResult
from xdeepserve.messages import (
    FinishReason,
    GenerateRequest,
    LoadReport,
    TokenLogprobs,
    TokenOutput,
)
from xdeepserve.rtc import KVCacheManager


@dataclass(slots=True)
class _Counters:
    """Totals since start, as in LoadReport; prefix cache counts are tokens."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hits: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def count_drafts(self, *, num_drafts: int, num_accepted: int) -> None:
        """Count one request's drafts of one step."""
        accepted = self.accepted_per_position
        accepted += [0] * (num_drafts - len(accepted))
        for position in range(num_accepted):
            accepted[position] += 1
        self.drafts += 1
        self.draft_tokens += num_drafts


class Scheduler:
    """The queues of one DP group and the only writer of its requests. Thread: the step loop.

    Order of service is (priority, arrival). Running requests come first; each is sure of one token,
    so a long prefill never stalls the others' decoding. When KV blocks run out, the last running
    request in that order gives its blocks back and is computed again later, from its tokens.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        kv: KVCacheManager,
        max_model_len: int,
        eos_token_ids: Sequence[int],
        speculator: Speculator | None = None,
    ) -> None:
        """Make an empty scheduler.

        Args:
            config: step budgets.
            kv: block ownership; used by this scheduler alone.
            max_model_len: longest prompt + output of a request.
            eos_token_ids: the model's end-of-sequence ids.
            speculator: source of drafts; used by this scheduler alone. None = no speculation.

        Raises:
            ConfigError: one request of max_model_len could never fit into the pool.
        """
        capacity = kv.num_total_blocks * kv.block_size
        if max_model_len > capacity:
            raise ConfigError(
                f"max_model_len={max_model_len} exceeds the KV cache's {capacity} tokens; "
                "lower max_model_len or raise kv_cache_bytes"
            )
        self._config = config
        self._kv = kv
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._speculator = speculator
        self._requests: dict[str, Request] = {}
        self._running = RequestQueue()
        self._waiting = RequestQueue()
        # Blocks that the waiting requests need for their present tokens.
        self._num_reserved_blocks = 0
        self._counters = _Counters()
        self._num_arrivals = 0

    # -- requests in and out --------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks, preempted ones included."""
        return len(self._waiting)

    @property
    def has_requests(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._requests)

    def add(self, request: GenerateRequest) -> None:
        """Accept a request; from now on it gets exactly one terminal output.

        Raises:
            RequestError: its id is in use.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request_id={request.request_id!r} is already in use")
        blocks = self._kv.open(cache_salt=request.cache_salt)
        accepted = Request(
            request,
            arrival=self._num_arrivals,
            blocks=blocks,
            eos_token_ids=self._eos_token_ids,
            max_model_len=self._max_model_len,
        )
        self._num_arrivals += 1
        self._requests[accepted.request_id] = accepted
        self._enter_waiting(accepted)

    def _enter_waiting(self, request: Request) -> None:
        self._waiting.add(request)
        self._num_reserved_blocks += self._num_blocks_of(request)

    def _leave_waiting(self, request: Request) -> None:
        self._waiting.remove(request)
        self._num_reserved_blocks -= self._num_blocks_of(request)

    def _num_blocks_of(self, request: Request) -> int:
        """Blocks for its present tokens, which do not change while it waits."""
        return -(-request.num_tokens // self._kv.block_size)

    def abort(self, request_id: str) -> TokenOutput | None:
        """End a request at any moment; its blocks are free at once.

        Between `schedule` and `update` call it only after `execute`, which reads the blocks.

        Returns:
            The terminal output, or None for an unknown or finished id.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish([request])
        return request.output(finish_reason=FinishReason.ABORT)

    def abort_all(self) -> list[TokenOutput]:
        """End every request; returns their terminal outputs."""
        outputs = [self.abort(request_id) for request_id in list(self._requests)]
        return [output for output in outputs if output is not None]

    def fail_all(self, message: str) -> list[TokenOutput]:
        """Terminal error outputs for all requests; the scheduler is of no use afterwards.

        Blocks are not given back: after a failed step their accounting may be what failed.
        """
        requests = list(self._requests.values())
        self._requests.clear()
        self._running.clear()
        self._waiting.clear()
        self._num_reserved_blocks = 0
        return [r.output(finish_reason=FinishReason.ERROR, error=message) for r in requests]

    # -- the step -------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Decide the next step: running requests first, then as many waiting ones as fit.

        Returns:
            The plan; it must go to `update` before the next `schedule`. Empty without requests.

        Raises:
            IntegrityError: requests are there, but none can run.
        """
        scheduled: list[ScheduledRequest] = []
        num_preemptions = self._counters.preemptions
        budget = self._schedule_running(scheduled, self._config.max_num_batched_tokens)
        if self._counters.preemptions == num_preemptions:
            budget = self._admit_waiting(scheduled, budget)
        num_tokens = self._config.max_num_batched_tokens - budget
        if self._speculator is not None:
            # A step that also prefills is bound by computing; drafts would only make it longer.
            if num_tokens == len(scheduled):
                num_tokens += self._add_drafts(self._speculator, scheduled, budget)
            self._ask_for_drafts(self._speculator, scheduled)
        plan = StepPlan(
            step_idx=self._counters.steps, scheduled=tuple(scheduled), num_tokens=num_tokens
        )
        if plan.is_empty and self._requests:
            raise IntegrityError(f"none of {len(self._requests)} requests can run")
        self._counters.steps += 1
        return plan

    def _schedule_running(self, scheduled: list[ScheduledRequest], budget: int) -> int:
        """Give tokens to running requests in order; returns the budget left."""
        running, block_size = self._running, self._kv.block_size
        # Preemption takes requests from the tail only, so the iteration meets each that is left.
        for idx, request in enumerate(running):
            num_computed = request.num_computed_tokens
            num_behind = len(running) - idx - 1
            num_tokens = min(len(request.token_ids) - num_computed, budget - num_behind)
            stop = num_computed + num_tokens
            # Most steps need no block: not worth a call each.
            has_room = stop <= len(request.blocks.block_ids) * block_size
            if not (has_room or self._make_room(request, stop)):
                break
            scheduled.append(request.share_of_step(num_tokens))
            budget -= num_tokens
        return budget

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Get blocks for `num_tokens` tokens, preempting from the tail of the running queue.

        The tail has not been scheduled yet in this step, because running requests are served in
        order. False when the request itself was the tail.
        """
        while not self._kv.allocate(request.blocks, num_tokens=num_tokens):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _admit_waiting(self, scheduled: list[ScheduledRequest], budget: int) -> int:
        """Start waiting requests in order while budget, seats and blocks last."""
        while self._waiting and budget > 0 and len(self._running) < self._config.max_num_seqs:
            request = self._waiting[0]
            if not self._start(request):
                break
            num_tokens = min(request.num_uncomputed_tokens, budget)
            scheduled.append(request.share_of_step(num_tokens))
            budget -= num_tokens
        return budget

    def _add_drafts(
        self, speculator: Speculator, scheduled: list[ScheduledRequest], budget: int
    ) -> int:
        """Spend what is left of a decode step's budget on drafts; returns their number.

        They take blocks that are free, one per running request left over, and never preempt.
        """
        if not scheduled or not speculator.begin_step(num_seqs=len(scheduled)):
            return 0
        total = 0
        for idx, item in enumerate(scheduled):
            request = self._requests[item.request_id]
            limit = min(budget - total, self._num_draftable(request)) if item.samples else 0
            drafts = speculator.propose(request.drafts, request.token_ids, limit=limit)
            if drafts:
                drafts = drafts[: self._make_draft_room(request, len(drafts))]
                scheduled[idx] = item._replace(draft_token_ids=drafts)
                total += len(drafts)
        return total

    def _ask_for_drafts(self, speculator: Speculator, scheduled: list[ScheduledRequest]) -> None:
        """Say of which requests the model should guess the ids after this step's."""
        for idx, item in enumerate(scheduled):
            wanted = speculator.num_wanted(self._requests[item.request_id].drafts)
            if wanted:
                scheduled[idx] = item._replace(num_drafts_wanted=wanted)

    def _num_draftable(self, request: Request) -> int:
        """Drafts that could become output, with one more id behind them."""
        if request.num_output_tokens == 0:
            return 0
        return request.max_num_tokens - request.num_tokens - 1

    def _make_draft_room(self, request: Request, num_drafts: int) -> int:
        """Get blocks for drafts if they are free; returns how many drafts the blocks hold."""
        num_tokens = request.num_tokens + num_drafts
        self._kv.allocate(request.blocks, num_tokens=num_tokens, num_reserved=len(self._running))
        return min(num_drafts, len(request.blocks) * self._kv.block_size - request.num_tokens)

    def _start(self, request: Request) -> bool:
        """Move a waiting request to the running queue if its blocks are there.

        Blocks for all its present tokens are taken at once, and one block per running request must
        be left, so that a newcomer does not drive the next step into preemption.
        """
        num_hit = self._kv.match(request.blocks, request.token_ids)
        if not self._kv.allocate(
            request.blocks, num_tokens=request.num_tokens, num_reserved=len(self._running)
        ):
            self._kv.free(request.blocks)
            return False
        request.num_computed_tokens = num_hit
        if request.num_cached_tokens is None:
            # A resumed request may find output cached too; the bill is about the prompt.
            request.num_cached_tokens = min(num_hit, request.num_prompt_tokens)
            self._counters.prompt_tokens += request.num_prompt_tokens
            self._counters.prefix_hits += request.num_cached_tokens
        self._leave_waiting(request)
        self._running.add(request)
        request.status = RequestStatus.RUNNING
        return True

    def _preempt(self, request: Request) -> None:
        self._kv.free(request.blocks)
        request.num_computed_tokens = 0
        self._running.remove(request)
        self._enter_waiting(request)
        request.status = RequestStatus.PREEMPTED
        self._counters.preemptions += 1

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenOutput]:
        """Commit a step: count tokens, publish full blocks, finish requests.

        Args:
            plan: what `schedule` returned last.
            result: what the executor made of it.

        Returns:
            One output per request that got a token. Requests that ended meanwhile are passed over.
        """
        outputs: list[TokenOutput] = []
        finished: list[Request] = []
        drafts = result.draft_token_ids or ((),) * len(plan.scheduled)
        rows = zip(plan.scheduled, result.token_ids, result.logprobs, drafts, strict=True)
        running = RequestStatus.RUNNING
        for item, token_ids, logprobs, next_drafts in rows:
            request = self._requests.get(item.request_id)
            if request is None or request.status is not running:
                continue
            _check_result(item, token_ids)
            request.num_computed_tokens += item.num_scheduled_tokens
            if token_ids:
                output = self._append(request, token_ids, logprobs)
                outputs.append(output)
                if self._speculator is not None:
                    self._accept(self._speculator, request, item, len(output.token_ids) - 1)
                    self._speculator.receive(request.drafts, next_drafts)
                if output.finish_reason is not None:
                    finished.append(request)
            self._kv.commit(
                request.blocks, request.token_ids, num_computed=request.num_computed_tokens
            )
        self._finish(finished)
        return outputs

    def _accept(
        self, speculator: Speculator, request: Request, item: ScheduledRequest, num_accepted: int
    ) -> None:
        """Count drafts that became output as computed; what the others wrote is overwritten."""
        num_drafts = len(item.draft_token_ids)
        if num_drafts == 0:
            return
        request.num_computed_tokens += num_accepted
        self._counters.count_drafts(num_drafts=num_drafts, num_accepted=num_accepted)
        speculator.record_drafts(request.drafts, num_drafts=num_drafts, num_accepted=num_accepted)

    def record_duration(self, plan: StepPlan, result: StepResult, duration_s: float) -> None:
        """A step took so long from `schedule` to `update`; decides whether drafts pay.

        Making drafts is charged to the steps that check some, which are the reason for it.
        """
        if self._speculator is None:
            return
        num_seqs, num_drafts = len(plan.scheduled), plan.num_drafts
        if num_drafts == 0:
            duration_s -= result.drafting_s
        if plan.num_tokens == num_seqs + num_drafts:
            self._speculator.record_step(
                num_seqs=num_seqs, num_drafts=num_drafts, duration_s=duration_s
            )

    def _append(
        self,
        request: Request,
        token_ids: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...] | None,
    ) -> TokenOutput:
        """Append new ids up to the first that ends the request."""
        finish_reason = None
        num_new = 0
        for token_id in token_ids:
            num_new += 1
            finish_reason = request.append(token_id)
            if finish_reason is not None:
                break
        self._counters.generated_tokens += num_new
        return request.output(
            num_new=num_new,
            logprobs=None if logprobs is None else list(logprobs[:num_new]),
            finish_reason=finish_reason,
        )

    def _finish(self, requests: Sequence[Request]) -> None:
        """Take requests out of their queues and give their blocks back.

        They are forgotten last: if giving back fails, `fail_all` still answers every one of them.
        """
        for request in requests:
            if request.status is RequestStatus.RUNNING:
                self._running.remove(request)
            else:
                self._leave_waiting(request)
            self._kv.free(request.blocks)
            request.status = RequestStatus.FINISHED
        for request in requests:
            del self._requests[request.request_id]

    # -- looking at it --------------------------------------------------------------------------

    def load_report(self) -> LoadReport:
        """Queues, KV use and totals at this moment."""
        counters = self._counters
        return LoadReport(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_free_blocks=self._kv.num_free_blocks,
            num_total_blocks=self._kv.num_total_blocks,
            num_reserved_blocks=self._num_reserved_blocks,
            num_steps=counters.steps,
            num_preemptions=counters.preemptions,
            num_prompt_tokens=counters.prompt_tokens,
            num_generated_tokens=counters.generated_tokens,
            prefix_cache_queries=counters.prompt_tokens,
            prefix_cache_hits=counters.prefix_hits,
            num_drafts=counters.drafts,
            num_draft_tokens=counters.draft_tokens,
            num_accepted_tokens=sum(counters.accepted_per_position),
            accepted_per_position=tuple(counters.accepted_per_position),
        )

    def check_integrity(self) -> None:
        """Check that queues and blocks add up; O(blocks + requests).

        Raises:
            IntegrityError: a request is in no queue, or blocks leaked.
        """
        queued = [*self._running, *self._waiting]
        if {id(r) for r in queued} != {id(r) for r in self._requests.values()}:
            raise IntegrityError(
                f"{len(queued)} requests are queued, but {len(self._requests)} are not finished"
            )
        if len(queued) != len(self._requests):
            raise IntegrityError("a request is queued twice")
        for request in self._waiting:
            if len(request.blocks):
                raise IntegrityError(f"waiting request {request.request_id} holds KV blocks")
        num_reserved = sum(self._num_blocks_of(request) for request in self._waiting)
        if num_reserved != self._num_reserved_blocks:
            raise IntegrityError(
                f"waiting requests need {num_reserved} KV blocks, but "
                f"{self._num_reserved_blocks} are reserved"
            )
        self._kv.check_integrity(r.blocks for r in queued)


def _check_result(item: ScheduledRequest, token_ids: tuple[int, ...]) -> None:
    """A sampling request gets one id and at most one more per draft, any other none.

    Raises:
        IntegrityError: it is not so.
    """
    most = 1 + len(item.draft_token_ids) if item.samples else 0
    if not min(most, 1) <= len(token_ids) <= most:
        raise IntegrityError(
            f"request {item.request_id}: {len(token_ids)} ids, samples={item.samples}, "
            f"{len(item.draft_token_ids)} drafts"
        )
