"""The wire structs between frontend and engine: token ids, parameters, outputs, load.

Plain msgspec structs: no text, no arrays, no behaviour beyond derived numbers, never pickled.
"""

from __future__ import annotations

import enum

import msgspec

GREEDY_TEMPERATURE = 1e-5
"""A temperature below this means greedy decoding."""

MAX_TOP_LOGPROBS = 20


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """How one request's tokens are chosen. Validated at the edge; the engine trusts it.

    Attributes:
        max_tokens: most output tokens, >= 1; the edge clips it to what the context leaves.
        min_tokens: EOS and stop tokens are masked until this many output tokens exist.
        temperature: 0 = greedy.
        top_k: keep the k most likely tokens; 0 = off.
        top_p: keep the smallest set with at least this probability mass; 1 = off.
        min_p: drop tokens below min_p times the most likely one's probability; 0 = off.
        seed: 64-bit key of the counter-based generator; always set (the edge draws one).
        repetition_penalty: > 1 discourages tokens of prompt and output (CTRL's rule).
        presence_penalty: subtracted once from tokens already in the output.
        frequency_penalty: subtracted per occurrence in the output.
        logit_bias: token id -> added to its logit.
        stop_token_ids: end the request, finish_reason stop; kept out of the text by the frontend.
        ignore_eos: the model's own EOS ids do not end the request.
        logprobs: None = off; n >= 0 = the chosen token's logprob and n alternatives, at most 20.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One sequence to generate.

    Attributes:
        request_id: unique per server run; ledger key.
        prompt_token_ids: at least one id, each in [0, vocab_size).
        params: see SamplingParams.
        cache_salt: prefix-cache salt of the tenant; equal prompts share KV only under equal salts.
        priority: lower is served first; equal priorities in order of arrival.
        resume_token_ids: output ids that another engine has made already; generation goes on after
            them as if this engine had made them. They count as output in every parameter, limit
            and usage, and are not sent again. Fewer than max_tokens, and none of them an end.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str = ""
    priority: int = 0
    resume_token_ids: list[int] = []


def num_blocks_needed(request: GenerateRequest, block_size: int) -> int:
    """KV blocks that the request's present tokens fill, the last one perhaps in part."""
    num_tokens = len(request.prompt_token_ids) + len(request.resume_token_ids)
    return -(-num_tokens // block_size)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log probabilities (natural log, of the raw model distribution) at one output position.

    Attributes:
        logprob: of the chosen token.
        top_ids: the n most likely ids, most likely first, ties by lower id.
        top_logprobs: theirs.
    """

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Usage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Token counts of one request so far, counted where tokens are made.

    `num_cached_tokens` prompt tokens were served from the prefix cache instead of being computed.
    """

    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_output_tokens: int = 0


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What one step produced for one request. The last one carries `finish_reason`.

    Attributes:
        token_ids: new output ids of this step, in order; may be empty on abort and error.
        logprobs: one entry per id in `token_ids` when asked for, else None.
        finish_reason: set exactly once, on the last output of a request.
        stop_token_id: the EOS or stop id that ended it, also last in `token_ids`; else None.
        usage: counts including this output.
        error: message, when finish_reason is error.
    """

    request_id: str
    token_ids: list[int]
    usage: Usage
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a frontend must know of an engine. Fixed for the engine's life."""

    model: str
    family: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    num_kv_blocks: int
    block_size: int
    max_num_seqs: int


class LoadReport(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A snapshot of one DP group: queues, KV use, and counters since start.

    `num_reserved_blocks` are KV blocks that accepted requests which hold none yet will need.
    Speculation: `num_drafts` counts sequences of drafts that were checked, `num_draft_tokens` the
    ids in them, `num_accepted_tokens` those that became output, and `accepted_per_position` the
    same by their place in the sequence of drafts.
    """

    num_running: int
    num_waiting: int
    num_free_blocks: int
    num_total_blocks: int
    num_reserved_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that requests hold, 0 to 1 (evictable cached blocks count as free)."""
        return 1.0 - self.num_free_blocks / max(1, self.num_total_blocks)

    @property
    def kv_demand(self) -> float:
        """Share of KV blocks held or reserved; above 1 when requests wait for blocks."""
        num_held = self.num_total_blocks - self.num_free_blocks
        return (num_held + self.num_reserved_blocks) / max(1, self.num_total_blocks)


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What the loop of a worker process says of itself.

    Attributes:
        progress: any number that differs whenever the loop has gone round since; a loop that hangs
            repeats it.
        is_idle: the loop has no work, so that standing still is no reproach.
        load: named numbers for `xds status`, such as running requests.
        stage_s: seconds by stage of the loop since the start of the process.
        error: why the loop ended for good; None while it lives.
    """

    progress: float
    is_idle: bool = False
    load: dict[str, float] = {}
    stage_s: dict[str, float] = {}
    error: str | None = None
