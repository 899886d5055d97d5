"""vLLM as a worker: its engine in this process, stepped by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import protocol
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Load the model; returns what runs an order."""
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=settings["model"],
            dtype=settings["variant"],
            max_num_seqs=settings["max_seqs"],
            max_num_batched_tokens=settings["batched_tokens"],
            max_model_len=settings["max_model_len"],
            enable_prefix_caching=settings["prefix_caching"],
            disable_log_stats=True,
        )
    )
    num_requests = 0

    def run(order: dict[str, Any]) -> dict[str, float]:
        nonlocal num_requests
        params = SamplingParams(
            max_tokens=order["output_len"],
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        start_s = time.perf_counter()
        for prompt in order["prompts"]:
            engine.add_request(str(num_requests), {"prompt_token_ids": prompt}, params)
            num_requests += 1
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                first.setdefault(output.request_id, now_s)
                last[output.request_id] = now_s
        return protocol.summary(
            start_s, list(first.values()), [last[i] for i in first], order["output_len"]
        )

    return run


if __name__ == "__main__":
    protocol.serve(start)
