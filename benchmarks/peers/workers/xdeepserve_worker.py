"""This project's engine as a worker: one colocated DP group, stepped by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import protocol

from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.launch.compose import load_model_at
from xdeepserve.messages import FinishReason, GenerateRequest, SamplingParams


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Load the model; returns what runs an order."""
    config = ModelConfig(
        dtype=settings["variant"],
        kv_cache_dtype=settings["kv_cache_dtype"],
        num_threads=settings["threads"],
    )
    group = build_dp_group(
        model=load_model_at(Path(settings["model"]), config),
        model_name="model",
        config=EngineConfig(max_num_seqs=settings["max_seqs"], **settings["engine"]),
    )
    num_orders = 0

    def run(order: dict[str, Any]) -> dict[str, float]:
        nonlocal num_orders
        num_orders += 1
        params = SamplingParams(max_tokens=order["output_len"], temperature=0.0, ignore_eos=True)
        salt = f"order {num_orders}"  # nothing is served from an earlier order's prefixes
        requests = [
            GenerateRequest(
                request_id=f"{salt} {idx}", prompt_token_ids=ids, params=params, cache_salt=salt
            )
            for idx, ids in enumerate(order["prompts"])
        ]
        first: dict[str, float] = {}
        last: dict[str, float] = {}
        start_s = time.perf_counter()
        for request in requests:
            group.submit(request)
        while len(last) < len(requests):
            outputs = group.step()
            now_s = time.perf_counter()
            for output in outputs:
                if output.token_ids:
                    first.setdefault(output.request_id, now_s)
                if output.finish_reason is FinishReason.ERROR:
                    raise RuntimeError(output.error)
                if output.finish_reason is not None:
                    last[output.request_id] = now_s
        ids = [request.request_id for request in requests]
        return protocol.summary(
            start_s, [first[i] for i in ids], [last[i] for i in ids], order["output_len"]
        )

    return run


if __name__ == "__main__":
    protocol.serve(start)
