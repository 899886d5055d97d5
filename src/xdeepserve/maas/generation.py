"""All choices of one HTTP request, running: fan out to the engine, merge by choice, clean up.

One task per choice pulls TokenOutputs and adds their text to that choice's pending delta; the
reader takes whatever is pending, so tokens that arrive together travel in one event. Leaving early,
for any reason, aborts what the engine still computes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import msgspec

from xdeepserve.clock import Clock
from xdeepserve.engine_api import EngineClient
from xdeepserve.errors import EngineDeadError, XDeepServeError
from xdeepserve.maas.accounts.caller import ANYBODY, Caller
from xdeepserve.maas.choice import ChoiceDelta, ChoiceText, TextOptions, merge_deltas
from xdeepserve.maas.ledger.billing import Charge
from xdeepserve.maas.ledger.running_bill import RunningBill
from xdeepserve.maas.metrics import GatewayMetrics
from xdeepserve.maas.sampling import choice_seed
from xdeepserve.messages import (
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenOutput,
    Usage,
)
from xdeepserve.telemetry import RequestTimeline
from xdeepserve.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UsageTotals:
    """Token counts of a whole HTTP request; a prompt counts once however many choices it has."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationPlan:
    """A validated request, ready to run.

    Attributes:
        prompts: token ids and parameters of each prompt.
        num_choices: choices per prompt.
        options: how text is made of tokens.
        arrived_s: monotonic time of arrival.
        cache_salt: prefixes are shared only with requests of the same salt.
        caller: who pays.
    """

    prompts: Sequence[tuple[list[int], SamplingParams]]
    num_choices: int
    options: TextOptions
    arrived_s: float
    cache_salt: str = ""
    caller: Caller = ANYBODY

    @property
    def num_prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(token_ids) for token_ids, _ in self.prompts)

    @property
    def max_output_tokens(self) -> int:
        """Of all choices."""
        return self.num_choices * sum(params.max_tokens for _, params in self.prompts)


class Generation:
    """Runs the requests of one HTTP call. Use `start`, `next_deltas` until empty, then `close`.

    Args:
        request_id: unique; the engine's request ids are made of it.
        charge: counts what is used; None where nobody pays.
    """

    def __init__(
        self,
        plan: GenerationPlan,
        request_id: str,
        *,
        engine: EngineClient,
        tokenizer: Tokenizer,
        metrics: GatewayMetrics,
        clock: Clock,
        charge: Charge | None = None,
    ) -> None:
        self.requests = requests = _engine_requests(plan, request_id)
        self._engine = engine
        self._metrics = metrics
        self._clock = clock
        self._num_choices = plan.num_choices
        self._texts = [ChoiceText(i, tokenizer, plan.options) for i in range(len(requests))]
        self._timelines = [RequestTimeline(plan.arrived_s) for _ in requests]
        self._usages = [Usage(len(request.prompt_token_ids)) for request in requests]
        self._pending: dict[int, list[ChoiceDelta]] = {}
        self._news = asyncio.Event()
        self._bill = RunningBill(charge, num_choices=plan.num_choices)
        self._num_open = len(requests)
        self._error: Exception | None = None
        self._endings: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Submit everything; returns at once."""
        self._tasks = [asyncio.create_task(self._pull(i)) for i in range(len(self.requests))]

    async def next_deltas(self) -> list[ChoiceDelta]:
        """What is new since the last call, at most one delta per choice; empty = all done.

        Raises:
            XDeepServeError: the engine refused or failed one of the requests.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._pending:
                deltas = [merge_deltas(self._pending[i]) for i in sorted(self._pending)]
                self._pending.clear()
                return deltas
            if self._num_open == 0:
                return []
            self._news.clear()
            await self._news.wait()

    def usage(self) -> UsageTotals:
        """Counts so far, as the engine reported them."""
        firsts = self._usages[:: self._num_choices]
        return UsageTotals(
            num_prompt_tokens=sum(usage.num_prompt_tokens for usage in firsts),
            num_cached_tokens=sum(usage.num_cached_tokens for usage in firsts),
            num_output_tokens=sum(usage.num_output_tokens for usage in self._usages),
        )

    def fail(self, error: XDeepServeError) -> None:
        """End the generation from outside; the reader gets `error`."""
        self._error = self._error or error
        self._news.set()

    async def close(self) -> None:
        """Stop pulling, abort whatever still runs, and close the charge. Idempotent."""
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            self._bill.close(self._endings)

    async def _pull(self, index: int) -> None:
        """One choice from submission to its end."""
        finish = FinishReason.ABORT.value
        try:
            finish = await self._stream(index)
        except Exception as exc:  # loop top: the reader raises it, or logs it as our bug
            finish = FinishReason.ERROR.value
            self._error = self._error or exc
        finally:
            self._num_open -= 1
            self._endings.append(finish)
            self._metrics.on_finished(
                timeline=self._timelines[index],
                usage=self._usages[index],
                finish_reason=finish,
                now_s=self._clock.monotonic(),
            )
            self._news.set()

    async def _stream(self, index: int) -> str:
        request = self.requests[index]
        outputs = self._engine.generate(request=request)
        is_ended = False
        try:
            async for output in outputs:
                is_ended = output.finish_reason is not None
                delta = self._take(index, output)
                if delta.finish_reason is not None:
                    return delta.finish_reason
        finally:
            if not is_ended:
                await self._engine.abort(request_id=request.request_id)
            if isinstance(outputs, AsyncGenerator):
                await outputs.aclose()
        raise EngineDeadError("the engine's stream ended without a finish reason")

    def _take(self, index: int, output: TokenOutput) -> ChoiceDelta:
        """Account for one output and queue its text."""
        timeline, now_s = self._timelines[index], self._clock.monotonic()
        self._metrics.on_tokens(timeline=timeline, count=len(output.token_ids), now_s=now_s)
        timeline.on_tokens(now_s=now_s, count=len(output.token_ids))
        self._usages[index] = output.usage
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise _engine_error(output)
        text = self._texts[index]
        delta = text.feed(output)
        if text.num_unread:
            num_read = output.usage.num_output_tokens - text.num_unread
            self._usages[index] = msgspec.structs.replace(output.usage, num_output_tokens=num_read)
        self._bill.take(index, self._usages[index])
        if not delta.is_empty:
            self._pending.setdefault(index, []).append(delta)
            self._news.set()
        return delta


def _engine_requests(plan: GenerationPlan, request_id: str) -> list[GenerateRequest]:
    """One engine request per choice: prompt-major, seeds derived per choice."""
    requests: list[GenerateRequest] = []
    for token_ids, params in plan.prompts:
        for choice in range(plan.num_choices):
            seed = choice_seed(params.seed, choice)
            requests.append(
                GenerateRequest(
                    request_id=f"{request_id}-{len(requests)}",
                    prompt_token_ids=token_ids,
                    params=msgspec.structs.replace(params, seed=seed) if choice else params,
                    cache_salt=plan.cache_salt,
                )
            )
    return requests


def _engine_error(output: TokenOutput) -> XDeepServeError:
    """Error of a request that the engine ended on its own; details go to the log only."""
    if output.finish_reason is FinishReason.ABORT:
        return EngineDeadError("the server aborted the request", code="aborted")
    logger.error("engine failed request %s: %s", output.request_id, output.error)
    return XDeepServeError("the engine failed while generating", code="engine_error")
