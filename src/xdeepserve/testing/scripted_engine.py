"""ScriptedEngine: an EngineClient without threads or model, for tests of the edge.

Answers by the default script of `scripted_executor`, or by the given answers; checks requests as a
real engine does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from xdeepserve.errors import CapacityError, EngineDeadError
from xdeepserve.flowserve.validation import validate_request
from xdeepserve.messages import (
    EngineInfo,
    FinishReason,
    GenerateRequest,
    LoadReport,
    TokenLogprobs,
    TokenOutput,
    Usage,
)
from xdeepserve.testing.scripted_executor import scripted_output

DEFAULT_INFO = EngineInfo(
    model="scripted",
    family="scripted",
    dtype="float32",
    vocab_size=256,
    max_model_len=128,
    eos_token_ids=(2,),
    num_kv_blocks=64,
    block_size=16,
    max_num_seqs=8,
)


class ScriptedEngine:
    """EngineClient whose tokens are known in advance.

    Attributes:
        requests: every accepted request, in order.
        aborted: ids that ended by abort, or whose iterator was closed early.
        is_full: refuse the next requests with CapacityError.
        is_dead: refuse them with EngineDeadError.
        gate: while cleared, running requests stop before their next token.
    """

    def __init__(
        self, *, info: EngineInfo = DEFAULT_INFO, answers: Sequence[Sequence[int]] = ()
    ) -> None:
        """Make an engine.

        Args:
            info: what it claims to be.
            answers: output ids of the first requests in order; later ones get the default script.
        """
        self.requests: list[GenerateRequest] = []
        self.aborted: list[str] = []
        self.is_full = False
        self.is_dead = False
        self.gate = asyncio.Event()
        self.gate.set()
        self._info = info
        self._answers = [list(answer) for answer in answers]
        self._running: set[str] = set()
        self._abort_asked: set[str] = set()
        self._num_generated = 0
        self._is_closing = False

    @property
    def info(self) -> EngineInfo:
        """What it claims to be."""
        return self._info

    def generate(self, *, request: GenerateRequest) -> AsyncIterator[TokenOutput]:
        """See EngineClient.generate."""
        validate_request(request, self._info)
        if self.is_dead:
            raise EngineDeadError("the scripted engine is dead")
        if self.is_full or self._is_closing:
            raise CapacityError("the scripted engine takes no requests")
        self.requests.append(request)
        answer = (
            self._answers.pop(0)
            if self._answers
            else scripted_output(request.prompt_token_ids, request.params.max_tokens)
        )
        return self._stream(request, answer)

    async def _stream(
        self, request: GenerateRequest, answer: list[int]
    ) -> AsyncIterator[TokenOutput]:
        request_id = request.request_id
        self._running.add(request_id)
        is_finished = False
        try:
            for count in range(len(request.resume_token_ids) + 1, len(answer) + 1):
                await self.gate.wait()
                await asyncio.sleep(0)
                if request_id in self._abort_asked:
                    break
                output = self._output(request, answer[:count], is_last=count == len(answer))
                is_finished = output.finish_reason is not None
                yield output
                if is_finished:
                    return
            yield _aborted(request)
        finally:
            self._running.discard(request_id)
            self._abort_asked.discard(request_id)
            if not is_finished:
                self.aborted.append(request_id)

    def _output(self, request: GenerateRequest, so_far: list[int], *, is_last: bool) -> TokenOutput:
        """The output of the last id in `so_far`; an answer that runs out ends by stop."""
        params, token_id = request.params, so_far[-1]
        self._num_generated += 1
        is_eos = token_id in self._info.eos_token_ids and not params.ignore_eos
        reason = None
        if is_eos or token_id in params.stop_token_ids:
            reason = FinishReason.STOP
        elif len(so_far) >= params.max_tokens:
            reason = FinishReason.LENGTH
        elif is_last:
            reason = FinishReason.STOP
        logprobs = None if params.logprobs is None else [TokenLogprobs(-0.5, [], [])]
        return TokenOutput(
            request_id=request.request_id,
            token_ids=[token_id],
            usage=Usage(len(request.prompt_token_ids), 0, len(so_far)),
            logprobs=logprobs,
            finish_reason=reason,
            stop_token_id=token_id if reason is FinishReason.STOP else None,
        )

    async def abort(self, *, request_id: str) -> None:
        """See EngineClient.abort."""
        if request_id in self._running:
            self._abort_asked.add(request_id)

    def load(self) -> LoadReport:
        """A report in which running requests hold no blocks."""
        return LoadReport(
            num_running=len(self._running),
            num_waiting=0,
            num_free_blocks=self._info.num_kv_blocks,
            num_total_blocks=self._info.num_kv_blocks,
            num_generated_tokens=self._num_generated,
        )

    def is_alive(self) -> bool:
        """Until `is_dead` is set or it is closed."""
        return not (self.is_dead or self._is_closing)

    async def close(self, *, drain_timeout_s: float) -> None:
        """Refuse new requests; running ones end by themselves."""
        self._is_closing = True


def _aborted(request: GenerateRequest) -> TokenOutput:
    return TokenOutput(
        request_id=request.request_id,
        token_ids=[],
        usage=Usage(len(request.prompt_token_ids)),
        finish_reason=FinishReason.ABORT,
    )
