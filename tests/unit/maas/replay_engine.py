"""An EngineClient that replays given TokenOutputs, several tokens per step if the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from tests.unit.text.byte_tokenizer import IM_END, VOCAB_SIZE
from xdeepserve.messages import (
    EngineInfo,
    FinishReason,
    GenerateRequest,
    LoadReport,
    TokenLogprobs,
    TokenOutput,
    Usage,
)

INFO = EngineInfo(
    model="toy",
    family="toy",
    dtype="float32",
    vocab_size=VOCAB_SIZE,
    max_model_len=512,
    eos_token_ids=(IM_END,),
    num_kv_blocks=64,
    block_size=16,
    max_num_seqs=8,
)


def steps_of(
    text: str, *, step: int = 3, finish: FinishReason = FinishReason.STOP, logprobs: bool = False
) -> list[TokenOutput]:
    """The outputs that make `text` with the byte tokenizer, `step` tokens at a time, EOS last."""
    ids = [*text.encode(), *([IM_END] if finish is FinishReason.STOP else [])]
    outputs: list[TokenOutput] = []
    for start in range(0, len(ids), step):
        part = ids[start : start + step]
        is_last = start + step >= len(ids)
        entries = [TokenLogprobs(-0.25, [i, 0], [-0.25, float("-inf")]) for i in part]
        outputs.append(
            TokenOutput(
                request_id="",
                token_ids=part,
                usage=Usage(0, 0, start + len(part)),
                logprobs=entries if logprobs else None,
                finish_reason=finish if is_last else None,
                stop_token_id=IM_END if is_last and finish is FinishReason.STOP else None,
            )
        )
    return outputs


class ReplayEngine:
    """Gives the n-th request the n-th script; the last script serves all later ones.

    Attributes:
        requests: everything submitted.
        aborted: ids for which `abort` was called.
        closed: ids whose iterator ended or was closed.
        gate: while cleared, no output is given.
        error: raised by the next submissions.
    """

    def __init__(self, *scripts: Sequence[TokenOutput], num_cached_tokens: int = 0) -> None:
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.closed: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.is_dead = False
        self.is_closed = False
        self._scripts = scripts
        self._num_cached_tokens = num_cached_tokens

    @property
    def info(self) -> EngineInfo:
        return INFO

    def generate(self, *, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        if self.error is not None:
            raise self.error
        script = self._scripts[min(len(self.requests), len(self._scripts) - 1)]
        self.requests.append(request)
        return self._replay(request, script)

    async def _replay(
        self, request: GenerateRequest, script: Sequence[TokenOutput]
    ) -> AsyncGenerator[TokenOutput, None]:
        try:
            for output in script:
                await self.gate.wait()
                await asyncio.sleep(0)
                yield self._addressed(request, output)
        finally:
            self.closed.append(request.request_id)

    def _addressed(self, request: GenerateRequest, output: TokenOutput) -> TokenOutput:
        return TokenOutput(
            request_id=request.request_id,
            token_ids=output.token_ids,
            usage=Usage(
                len(request.prompt_token_ids),
                self._num_cached_tokens,
                output.usage.num_output_tokens,
            ),
            logprobs=None if request.params.logprobs is None else output.logprobs,
            finish_reason=output.finish_reason,
            stop_token_id=output.stop_token_id,
            error=output.error,
        )

    async def abort(self, *, request_id: str) -> None:
        self.aborted.append(request_id)

    def load(self) -> LoadReport:
        running = len(self.requests) - len(self.closed)
        return LoadReport(
            num_running=running,
            num_waiting=3,
            num_free_blocks=48,
            num_total_blocks=64,
            num_preemptions=5,
            num_prompt_tokens=7,
            num_generated_tokens=11,
            prefix_cache_queries=13,
            prefix_cache_hits=2,
            num_drafts=3,
            num_draft_tokens=12,
            num_accepted_tokens=7,
            accepted_per_position=(3, 2, 2, 0),
        )

    def is_alive(self) -> bool:
        return not self.is_dead

    async def close(self, *, drain_timeout_s: float) -> None:
        self.is_closed = True
