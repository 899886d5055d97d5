"""Executor: computes a plan. The protocol, and the implementation inside the DP group's process."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.flowserve.input_batch import build_forward_batch, split_microbatches
from xdeepserve.flowserve.microbatch_tuner import MicrobatchTuner
from xdeepserve.flowserve.mtp_drafter import MtpDrafter
from xdeepserve.flowserve.step import (
    ScheduledRequest,
    StepPlan,
    StepResult,
    num_confirmed,
)
from xdeepserve.messages import SamplingParams, TokenLogprobs
from xdeepserve.models.batch import ForwardBatch
from xdeepserve.models.decoder import Model
from xdeepserve.models.sampler import HeadOrder, Sampler, SampleResult, SampleRow
from xdeepserve.ops import F32, I32
from xdeepserve.transformerless.attention_worker import AttentionWorker
from xdeepserve.transformerless.moe_transport import MoeTransport
from xdeepserve.transformerless.stage_times import Stage, StageTimes


class Executor(Protocol):
    """Computes steps; owns the KV arrays. Thread: the step loop."""

    def warm_up(self) -> None:
        """Touch weights and buffers, so that the first request does not pay for it.

        Call it before the first `execute` only.
        """
        ...

    def execute(self, *, plan: StepPlan) -> StepResult:
        """Compute a non-empty plan: write the KV of its tokens, sample where it says so.

        Never frees a block and never ends a request. Reads the plan, keeps nothing of it.

        Returns:
            New token ids and logprobs, aligned with `plan.scheduled`.
        """
        ...

    def close(self) -> None:
        """Free buffers and peers. Idempotent."""
        ...


class InProcExecutor:
    """Attention, LM head and sampler in this process; experts too, or where a transport leads."""

    def __init__(
        self,
        *,
        model: Model,
        transport: MoeTransport | None,
        num_blocks: int,
        block_size: int,
        stage_times: StageTimes,
        num_microbatches: int | None = 1,
        with_mtp: bool = False,
    ) -> None:
        """Allocate the KV arrays; their memory is committed as blocks are first written.

        Args:
            model: its attention side is run here.
            transport: leads to its FFN and experts; closed with the executor. None = they are
                computed here, and all layers are one operator.
            num_blocks: KV blocks, as many as the scheduler's pool has.
            block_size: tokens per KV block.
            stage_times: where the stages of a step are counted.
            num_microbatches: parts of a step in flight at once; 1 when nothing can overlap, None =
                chosen by measured times.
            with_mtp: make drafts by the model's MTP layer, which it must have.
        """
        self._model = model
        self._transport = transport
        self._block_size = block_size
        self._num_microbatches = num_microbatches
        self._tuner = MicrobatchTuner()
        self._sampler = Sampler(model.ops, eos_token_ids=model.spec.eos_token_ids)
        self._times = stage_times
        self._kv_layers = model.new_kv(num_blocks, block_size)
        self._stack = model.stack
        self._worker: AttentionWorker | None = None
        if transport is not None:
            self._worker = AttentionWorker(
                side=model.attention_side,
                transport=transport,
                kv_layers=self._kv_layers,
                stage_times=stage_times,
            )
        self._drafter: MtpDrafter | None = None
        if with_mtp:
            assert model.mtp is not None, "build_dp_group() refuses a model without MTP layer"
            self._drafter = MtpDrafter(
                model.mtp,
                kv=model.kv_format.new_layer(num_blocks, block_size),
                sampler=self._sampler,
                max_positions=model.spec.max_position_embeddings,
            )

    def warm_up(self) -> None:
        """Compute one token in KV block 0, which nobody holds yet."""
        item = ScheduledRequest(
            request_id="warm-up",
            params=SamplingParams(max_tokens=1),
            token_ids=array("i", [0]),
            num_prompt_tokens=1,
            num_computed_tokens=0,
            num_scheduled_tokens=1,
            block_ids=array("i", [0]),
            samples=True,
        )
        self.execute(plan=StepPlan(step_idx=0, scheduled=(item,), num_tokens=1))

    def execute(self, *, plan: StepPlan) -> StepResult:
        """See Executor.execute."""
        with self._times.measure(Stage.INPUTS):
            rows = _sample_rows(plan.scheduled)
            order = HeadOrder.of(rows)
        batches, hidden_states = self._run(plan)
        if rows:
            with self._times.measure(Stage.HEAD):
                greedy_ids, logits = self._head(batches, hidden_states, order)
            with self._times.measure(Stage.SAMPLE):
                sampled = self._sampler.complete(order, greedy_ids, logits, rows)
                result = _result(plan, sampled)
        else:
            nothing = len(plan.scheduled)
            result = StepResult(token_ids=((),) * nothing, logprobs=(None,) * nothing)
        return result if self._drafter is None else self._draft(plan, hidden_states, result)

    def _draft(
        self, plan: StepPlan, hidden_states: Sequence[F32], result: StepResult
    ) -> StepResult:
        """The result with drafts for the next step."""
        assert self._drafter is not None, "called for executors with a drafter"
        begun_s = SYSTEM_CLOCK.monotonic()
        with self._times.measure(Stage.DRAFT):
            rows = hidden_states[0] if len(hidden_states) == 1 else np.concatenate(hidden_states)
            drafts = self._drafter.draft(plan.scheduled, rows, result.token_ids)
        return replace(
            result, draft_token_ids=drafts, drafting_s=SYSTEM_CLOCK.monotonic() - begun_s
        )

    def _run(self, plan: StepPlan) -> tuple[list[ForwardBatch], list[F32]]:
        """The plan's microbatches and their hidden states."""
        if self._num_microbatches is not None:
            return self._run_cut(plan, self._num_microbatches)
        num_tokens = plan.num_tokens
        count = self._tuner.choose(num_tokens=num_tokens, num_seqs=len(plan.scheduled))
        begun_s = SYSTEM_CLOCK.monotonic()
        result = self._run_cut(plan, count)
        duration_s = SYSTEM_CLOCK.monotonic() - begun_s
        self._tuner.record(num_tokens=num_tokens, count=count, duration_s=duration_s)
        return result

    def _run_cut(self, plan: StepPlan, count: int) -> tuple[list[ForwardBatch], list[F32]]:
        with self._times.measure(Stage.INPUTS):
            parts = split_microbatches(plan.scheduled, count)
            batches = [build_forward_batch(part, self._block_size) for part in parts]
        return batches, self._run_layers(batches, plan.step_idx)

    def _run_layers(self, batches: Sequence[ForwardBatch], step_idx: int) -> list[F32]:
        """Hidden states [T, H] of each batch, before the final norm."""
        if self._worker is not None:
            return self._worker.run(batches, step_idx=step_idx)
        with self._times.measure(Stage.LAYERS):
            return [self._run_stack(batch) for batch in batches]

    def _run_stack(self, batch: ForwardBatch) -> F32:
        embedded = self._model.embedding(batch.token_ids)
        return self._model.ops.decoder_layers(
            self._stack, embedded, batch.attention, self._kv_layers
        )

    def _head(
        self, batches: Sequence[ForwardBatch], hidden_states: Sequence[F32], order: HeadOrder
    ) -> tuple[I32, F32]:
        """`HeadUnit.choose` for all rows that sample, by one pass over the LM head."""
        parts = [
            rows if len(rows) == len(batch.logits_rows) else rows[batch.logits_rows]
            for rows, batch in zip(hidden_states, batches, strict=True)
        ]
        together = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._model.head.choose(order.arrange(together), order.num_greedy)

    def close(self) -> None:
        """Close the transport."""
        if self._transport is not None:
            self._transport.close()


def _sample_rows(scheduled: Sequence[ScheduledRequest]) -> list[SampleRow]:
    """Of each that samples the row behind its last token and those behind its drafts."""
    rows: list[SampleRow] = []
    for item in scheduled:
        if not item.samples:
            continue
        token_ids, drafts = item.token_ids, item.draft_token_ids
        position = len(token_ids)
        if drafts:
            token_ids = token_ids + array("i", drafts)
        for behind in range(position, position + len(drafts) + 1):
            rows.append(SampleRow(item.params, token_ids, item.num_prompt_tokens, behind))
    return rows


def _result(plan: StepPlan, sampled: SampleResult) -> StepResult:
    """Give each request what was sampled for it."""
    if plan.num_tokens == len(plan.scheduled) == len(sampled.token_ids):
        # A row each, and all sample.
        return StepResult(
            token_ids=tuple(zip(sampled.token_ids, strict=True)),
            logprobs=tuple(None if row is None else (row,) for row in sampled.logprobs),
        )
    return _spread(plan.scheduled, sampled)


def _spread(scheduled: Sequence[ScheduledRequest], sampled: SampleResult) -> StepResult:
    """Spread the sampled rows over the plan, as far as each request's drafts are confirmed."""
    token_ids: list[tuple[int, ...]] = []
    logprobs: list[tuple[TokenLogprobs, ...] | None] = []
    stop = 0
    for item in scheduled:
        if not item.samples:
            token_ids.append(())
            logprobs.append(None)
            continue
        start, stop = stop, stop + 1 + len(item.draft_token_ids)
        ids = tuple(sampled.token_ids[start:stop])
        if item.draft_token_ids:
            ids = ids[: 1 + num_confirmed(item.draft_token_ids, ids)]
        token_ids.append(ids)
        entries = sampled.logprobs[start : start + len(ids)]
        logprobs.append(None if item.params.logprobs is None else _confirmed(entries))
    return StepResult(token_ids=tuple(token_ids), logprobs=tuple(logprobs))


def _confirmed(logprobs: Sequence[TokenLogprobs | None]) -> tuple[TokenLogprobs, ...]:
    """Of a request that asked for them, so that there is one for each id."""
    return tuple(entry for entry in logprobs if entry is not None)
