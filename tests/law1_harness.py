"""Law 1, executable: the tokens and logprobs of a request depend on nothing around it.

Each check takes a `GroupFactory` and runs the same requests in two settings; results must be equal
to the last bit. The factory decides the model, so the same checks run on toys and on real weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.messages import (
    FinishReason,
    GenerateRequest,
    SamplingParams,
    TokenLogprobs,
    Usage,
)

GroupFactory = Callable[[EngineConfig], DPGroup]
"""config -> a fresh, unstarted DP group."""

NUM_TOP_LOGPROBS = 3

LONG_PROMPT = 150
"""Longer than a KV partition of the attention operators."""


@dataclass
class Generation:
    """All that one request got."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    @property
    def content(self) -> tuple[list[int], list[TokenLogprobs], FinishReason | None]:
        """What must not depend on anything around the request; exact floats included."""
        return self.token_ids, self.logprobs, self.finish_reason


def config(**fields: Any) -> EngineConfig:
    """Small limits; a check names what it varies."""
    defaults = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "block_size": 8,
        "num_kv_blocks": 256,
    }
    return EngineConfig(**(defaults | fields))


def request(request_id: str, prompt: Sequence[int], **params: Any) -> GenerateRequest:
    """A request that asks for logprobs."""
    defaults = {"max_tokens": 8, "temperature": 0.0, "logprobs": NUM_TOP_LOGPROBS, "seed": 7}
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        params=SamplingParams(**(defaults | params)),
    )


def mixed_requests(
    vocab_size: int, count: int, *, max_tokens: int = 8, seed: int = 0
) -> list[GenerateRequest]:
    """Requests of many lengths and every way of sampling, the same on every run of a `seed`."""
    styles: list[dict[str, Any]] = [
        {},
        {"temperature": 0.8, "seed": 11},
        {"temperature": 1.1, "top_k": 20, "top_p": 0.9, "seed": 12},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 13},
        {"presence_penalty": 0.5, "frequency_penalty": 0.3, "ignore_eos": True},
        {"temperature": 0.9, "logit_bias": {9: 2.0, 11: -3.0}, "min_tokens": 4, "seed": 14},
    ]
    requests = []
    for idx in range(count):
        salt = idx + 17 * seed
        length = LONG_PROMPT if salt % 8 == 7 else 1 + (salt * 13) % 37
        prompt = [3 + (salt * 101 + j * 29 + j * j) % (vocab_size - 3) for j in range(length)]
        params = {"max_tokens": max_tokens, "seed": 7} | styles[idx % len(styles)]
        params["seed"] += 100 * seed
        requests.append(request(f"r{idx}", prompt, **params))
    return requests


def generate(
    group: DPGroup, requests: Sequence[GenerateRequest], *, max_steps: int = 5000
) -> dict[str, Generation]:
    """Run requests together, stepping by hand; checks that the KV pool is whole afterwards."""
    free_before = group.load().num_free_blocks
    for item in requests:
        group.submit(item)
    results = {item.request_id: Generation([], []) for item in requests}
    for _ in range(max_steps):
        for output in group.step():
            result = results[output.request_id]
            result.token_ids += output.token_ids
            result.logprobs += output.logprobs or []
            result.finish_reason, result.usage = output.finish_reason, output.usage
        if all(result.finish_reason is not None for result in results.values()):
            assert group.load().num_free_blocks == free_before
            return results
    raise AssertionError(f"requests are not finished after {max_steps} steps")


def contents(results: dict[str, Generation]) -> dict[str, Any]:
    """What two settings are compared by."""
    return {request_id: result.content for request_id, result in results.items()}


def solo(make_group: GroupFactory, requests: Sequence[GenerateRequest]) -> dict[str, Any]:
    """Each request in an engine of its own, unchunked: what every other setting must equal."""
    wide = config()
    return {
        item.request_id: generate(make_group(wide), [item])[item.request_id].content
        for item in requests
    }


def check_alone_equals_batched(
    make_group: GroupFactory, requests: Sequence[GenerateRequest], expected: dict[str, Any]
) -> None:
    """In one batch with all others."""
    group = make_group(config(max_num_seqs=len(requests)))
    assert contents(generate(group, requests)) == expected


def check_any_chunk_size(
    make_group: GroupFactory,
    requests: Sequence[GenerateRequest],
    expected: dict[str, Any],
    chunk_sizes: Sequence[int],
) -> None:
    """Prompts computed in chunks of any size."""
    for size in chunk_sizes:
        group = make_group(config(max_num_seqs=size, max_num_batched_tokens=size))
        assert contents(generate(group, requests)) == expected, f"chunk size {size}"


def check_prefix_hit_equals_recompute(
    make_group: GroupFactory, requests: Sequence[GenerateRequest], expected: dict[str, Any]
) -> None:
    """Prompt KV found in the cache: written by an earlier run, prompt and output blocks alike."""
    group = make_group(config())
    generate(group, requests)
    again = generate(group, requests)
    assert contents(again) == expected
    hits = sum(r.usage.num_cached_tokens for r in again.values() if r.usage is not None)
    assert hits > 0, "no prompt was long enough to hit the cache; nothing was checked"


def check_decoded_kv_equals_prefilled(make_group: GroupFactory, item: GenerateRequest) -> None:
    """A second turn whose prompt holds the first answer: its KV came from decoding."""
    block_size = config().block_size
    first = msgspec.structs.replace(
        item,
        params=msgspec.structs.replace(item.params, max_tokens=2 * block_size, ignore_eos=True),
    )
    group = make_group(config())
    answer = generate(group, [first])[first.request_id].token_ids
    prompt = [*item.prompt_token_ids, *answer, 5]
    turn = request("turn", prompt)
    cached = generate(group, [turn])["turn"]
    fresh = generate(make_group(config(prefix_caching=False)), [turn])["turn"]
    assert cached.usage is not None
    assert cached.usage.num_cached_tokens > len(item.prompt_token_ids)
    assert cached.content == fresh.content


def check_preempted_equals_undisturbed(
    make_group: GroupFactory, requests: Sequence[GenerateRequest], *, num_tokens: int = 20
) -> None:
    """A pool so small that four requests of `num_tokens` are preempted and computed again."""
    short = [
        msgspec.structs.replace(
            item,
            prompt_token_ids=item.prompt_token_ids[:5],
            params=msgspec.structs.replace(item.params, max_tokens=num_tokens, ignore_eos=True),
        )
        for item in requests[:4]
    ]
    expected = solo(make_group, short)
    for prefix_caching in (True, False):
        tiny = config(num_kv_blocks=6, prefix_caching=prefix_caching, max_model_len=48)
        group = make_group(tiny)
        assert contents(generate(group, short)) == expected
        assert group.load().num_preemptions > 0, "nothing was preempted; nothing was checked"


def check_microbatches(
    make_group: GroupFactory, requests: Sequence[GenerateRequest], expected: dict[str, Any]
) -> None:
    """Steps split into interleaved microbatches."""
    for count in (2, 3):
        group = make_group(config(max_num_batched_tokens=64, num_microbatches=count))
        assert contents(generate(group, requests)) == expected, f"{count} microbatches"


def check_tokens_without_logprobs(
    make_group: GroupFactory, requests: Sequence[GenerateRequest], expected: dict[str, Any]
) -> None:
    """Requests that ask for no logprobs, so that greedy ones never see logits: all, every third."""
    for stride in (1, 3):
        quiet = {item.request_id for item in requests[::stride]}
        mixed = [
            msgspec.structs.replace(
                item, params=msgspec.structs.replace(item.params, logprobs=None)
            )
            if item.request_id in quiet
            else item
            for item in requests
        ]
        for request_id, result in generate(make_group(config()), mixed).items():
            token_ids, logprobs, finish_reason = expected[request_id]
            wanted = [] if request_id in quiet else logprobs
            assert result.content == (token_ids, wanted, finish_reason)


def check_two_runs(make_group: GroupFactory, requests: Sequence[GenerateRequest]) -> None:
    """The same engine set up twice."""
    runs = [contents(generate(make_group(config()), requests)) for _ in range(2)]
    assert runs[0] == runs[1]
