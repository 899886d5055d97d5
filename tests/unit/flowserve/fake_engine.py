"""FakeEngine: an EngineClient whose every output, refusal and death is the test's decision."""

from __future__ import annotations

from weakref import WeakValueDictionary

import msgspec

from xdeepserve.errors import CapacityError, EngineDeadError
from xdeepserve.flowserve.token_stream import TokenStream
from xdeepserve.messages import (
    EngineInfo,
    FinishReason,
    GenerateRequest,
    LoadReport,
    TokenLogprobs,
    TokenOutput,
    Usage,
    num_blocks_needed,
)
from xdeepserve.testing.scripted_engine import DEFAULT_INFO
from xdeepserve.testing.scripted_executor import next_scripted_id

INFO: EngineInfo = msgspec.structs.replace(DEFAULT_INFO, block_size=4)


class FakeEngine:
    """Holds requests until the test moves them.

    Attributes:
        running: requests under way, by the id this engine knows them by.
        aborted: ids it was asked to end; `keeps_aborted` = it does not obey.
        num_held_blocks: added to the blocks of running requests in its load.
        num_refused: requests that it has refused late.
    """

    def __init__(self, info: EngineInfo = INFO) -> None:
        self.info = info
        self.running: dict[str, GenerateRequest] = {}
        self.aborted: list[str] = []
        self.num_held_blocks = 0
        self.num_cached_tokens = 0
        self.is_up = True
        self.is_full = False
        self.refuses_late = False
        self.num_refused = 0
        self.keeps_aborted = False
        self.is_closed = False
        self._token_ids: dict[str, list[int]] = {}
        self._streams: WeakValueDictionary[str, TokenStream] = WeakValueDictionary()

    # -- EngineClient ---------------------------------------------------------------------------

    def generate(self, *, request: GenerateRequest) -> TokenStream:
        if not self.is_up:
            raise EngineDeadError("down")
        if self.is_full:
            raise CapacityError("full")
        request_id = request.request_id
        assert request_id not in self.running
        stream = TokenStream(request_id, abort=self._on_abort)
        if self.refuses_late:
            self.num_refused += 1
            stream.fail(CapacityError("full after all"))
            return stream
        self.running[request_id] = request
        self._token_ids[request_id] = [*request.prompt_token_ids, *request.resume_token_ids]
        self._streams[request_id] = stream
        return stream

    def _on_abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if request_id in self.running and not self.keeps_aborted:
            self.end(request_id, FinishReason.ABORT)

    async def abort(self, *, request_id: str) -> None:
        self._on_abort(request_id)

    def load(self) -> LoadReport:
        num_blocks = self.info.num_kv_blocks
        held = sum(num_blocks_needed(r, self.info.block_size) for r in self.running.values())
        return LoadReport(
            num_running=len(self.running),
            num_waiting=0,
            num_free_blocks=num_blocks - held - self.num_held_blocks,
            num_total_blocks=num_blocks,
        )

    def is_alive(self) -> bool:
        return self.is_up and not self.is_closed

    async def close(self, *, drain_timeout_s: float) -> None:
        self.is_closed = True

    # -- the test's side ------------------------------------------------------------------------

    def emit(self, request_id: str) -> None:
        """The next token of the default script; the last one by max_tokens."""
        request = self.running[request_id]
        token_ids = self._token_ids[request_id]
        token_ids.append(next_scripted_id(token_ids))
        num_output = len(token_ids) - len(request.prompt_token_ids)
        is_last = num_output >= request.params.max_tokens
        self._push(request_id, token_ids[-1:], FinishReason.LENGTH if is_last else None)

    def end(self, request_id: str, reason: FinishReason) -> None:
        """A terminal output without tokens."""
        self._push(request_id, [], reason)

    def _push(self, request_id: str, ids: list[int], reason: FinishReason | None) -> None:
        request = self.running[request_id]
        num_prompt = len(request.prompt_token_ids)
        num_output = len(self._token_ids[request_id]) - num_prompt
        wants_logprobs = request.params.logprobs is not None
        output = TokenOutput(
            request_id=request_id,
            token_ids=ids,
            usage=Usage(num_prompt, self.num_cached_tokens, num_output),
            logprobs=[TokenLogprobs(-float(num_output), [], [])] if wants_logprobs else None,
            finish_reason=reason,
        )
        if (stream := self._streams.get(request_id)) is not None:
            stream.push(output)
        if reason is not None:
            del self.running[request_id]
            self._streams.pop(request_id, None)

    def die(self) -> None:
        """Lose everything at once, as a killed process does."""
        self.is_up = False
        self.running.clear()
        for stream in list(self._streams.values()):
            stream.fail(EngineDeadError("killed"))
        self._streams.clear()

    def revive(self) -> None:
        """A new process in the place of the dead one."""
        self.is_up = True
