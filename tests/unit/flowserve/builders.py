"""Builders: a scheduler, an engine and requests, of which a test names only what it varies."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.scheduler import Scheduler
from xdeepserve.flowserve.speculator import Proposer, Speculator
from xdeepserve.messages import EngineInfo, GenerateRequest, SamplingParams, TokenOutput
from xdeepserve.rtc import KVCacheManager
from xdeepserve.testing.fake_clock import FakeClock
from xdeepserve.testing.scripted_executor import Script, ScriptedExecutor, next_scripted_id

EOS = 2


def make_config(**fields: Any) -> EngineConfig:
    defaults = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_kv_blocks": 64,
        "max_num_waiting": 16,
    }
    return EngineConfig(**(defaults | fields))


def make_scheduler(
    config: EngineConfig, *, max_model_len: int = 64, proposer: Proposer | None = None
) -> Scheduler:
    """Drafts come from `proposer`, or from the executor where the config says mtp."""
    kv = KVCacheManager(
        num_blocks=config.num_kv_blocks,
        block_size=config.block_size,
        prefix_caching=config.prefix_caching,
    )
    speculator = None
    if proposer is not None or config.speculation == "mtp":
        number = config.num_speculative_tokens
        speculator = Speculator(proposer, num_speculative_tokens=number)
    return Scheduler(
        config=config,
        kv=kv,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        speculator=speculator,
    )


def make_executor(config: EngineConfig, script: Script | None = None) -> ScriptedExecutor:
    script_args = {} if script is None else {"script": script}
    return ScriptedExecutor(
        num_blocks=config.num_kv_blocks, block_size=config.block_size, **script_args
    )


def make_request(
    request_id: str,
    prompt: Sequence[int] = (5, 6, 7),
    *,
    priority: int = 0,
    cache_salt: str = "",
    **params: Any,
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(**({"max_tokens": 4} | params)),
        priority=priority,
        cache_salt=cache_salt,
    )


class ScriptProposer:
    """Knows the default script; every `wrong_every`-th draft is wrong."""

    def __init__(self, wrong_every: int = 0) -> None:
        self._wrong_every = wrong_every
        self._num_drafts = 0

    def propose(self, token_ids: array[int], *, limit: int) -> tuple[int, ...]:
        known = list(token_ids)
        for _ in range(limit):
            known.append(next_scripted_id(known))
            self._num_drafts += 1
            if self._wrong_every and self._num_drafts % self._wrong_every == 0:
                known[-1] = 120
        return tuple(known[len(token_ids) :])


class Harness:
    """Scheduler and scripted executor, stepped by hand; collects what each request got."""

    def __init__(
        self,
        *,
        max_model_len: int = 64,
        script: Script | None = None,
        proposer: Proposer | None = None,
        **config: Any,
    ) -> None:
        self.config = make_config(**config)
        self.scheduler = make_scheduler(self.config, max_model_len=max_model_len, proposer=proposer)
        self.executor = make_executor(self.config, script)
        self.outputs: dict[str, list[TokenOutput]] = {}
        self.shares: list[dict[str, int]] = []

    def add(self, *requests: GenerateRequest) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self, *, abort_between: Sequence[str] = ()) -> list[TokenOutput]:
        """One step; the named requests are aborted between execute and update."""
        plan = self.scheduler.schedule()
        self.shares.append({i.request_id: i.num_rows for i in plan.scheduled})
        outputs: list[TokenOutput] = []
        if not plan.is_empty:
            result = self.executor.execute(plan=plan)
            ended = [self.scheduler.abort(request_id) for request_id in abort_between]
            outputs += [output for output in ended if output is not None]
            outputs += self.scheduler.update(plan, result)
            self.scheduler.record_duration(plan, result, 1.0)  # drafts cost nothing here
        self.record(outputs)
        self.scheduler.check_integrity()
        return outputs

    def record(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            got = self.outputs.setdefault(output.request_id, [])
            assert not got or got[-1].finish_reason is None, "output after the terminal one"
            got.append(output)

    def run(self, *, max_steps: int = 1000) -> None:
        """Step until nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests:
                return
            self.step()
        raise AssertionError(f"not idle after {max_steps} steps")

    def tokens(self, request_id: str) -> list[int]:
        return [i for output in self.outputs[request_id] for i in output.token_ids]

    def last(self, request_id: str) -> TokenOutput:
        return self.outputs[request_id][-1]


def make_group(
    config: EngineConfig,
    executor: ScriptedExecutor,
    *,
    clock: FakeClock | None = None,
    max_model_len: int = 64,
) -> DPGroup:
    info = EngineInfo(
        model="scripted",
        family="scripted",
        dtype="float32",
        vocab_size=128,
        max_model_len=max_model_len,
        eos_token_ids=(EOS,),
        num_kv_blocks=config.num_kv_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
    )
    return DPGroup(
        info=info,
        scheduler=make_scheduler(config, max_model_len=max_model_len),
        executor=executor,
        clock=clock or FakeClock(),
        max_num_waiting=config.max_num_waiting,
    )
