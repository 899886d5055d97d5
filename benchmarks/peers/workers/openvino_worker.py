"""OpenVINO GenAI as a worker: its continuous batching pipeline, stepped by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
import protocol

CACHE_GIB = 4


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Load the model; returns what runs an order."""
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = CACHE_GIB
    scheduler.max_num_seqs = settings["max_seqs"]
    scheduler.max_num_batched_tokens = settings["batched_tokens"]
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = settings["prefix_caching"]
    properties = {
        "PERFORMANCE_HINT": settings["hint"],
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": settings["threads"],
    }
    pipeline = genai.ContinuousBatchingPipeline(
        settings["model"], scheduler_config=scheduler, device="CPU", properties=properties
    )
    num_requests = 0

    def run(order: dict[str, Any]) -> dict[str, float]:
        nonlocal num_requests
        config = genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = order["output_len"]
        config.ignore_eos = True
        config.do_sample = False
        tensors = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids in order["prompts"]]
        start_s = time.perf_counter()
        handles = []
        for tensor in tensors:
            handles.append(pipeline.add_request(num_requests, tensor, config))
            num_requests += 1
        first_s = [0.0] * len(handles)
        last_s = [0.0] * len(handles)
        left = set(range(len(handles)))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now_s = time.perf_counter()
            for idx in tuple(left):
                if handles[idx].can_read():
                    handles[idx].read()
                    first_s[idx] = first_s[idx] or now_s
                    last_s[idx] = now_s
                if handles[idx].get_status() != genai.GenerationStatus.RUNNING:
                    left.remove(idx)
        return protocol.summary(start_s, first_s, last_s, order["output_len"])

    return run


if __name__ == "__main__":
    protocol.serve(start)
