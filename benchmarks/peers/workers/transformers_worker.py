"""Transformers as a worker: one batch of equal prompts, forward passes without `generate`.

That leaves out what `generate` does around each pass, which is in its favour.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import protocol
import torch
from transformers import AutoModelForCausalLM, DynamicCache


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Load the model; returns what runs an order."""
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["variant"]), attn_implementation="sdpa"
    ).eval()

    @torch.inference_mode()
    def run(order: dict[str, Any]) -> dict[str, float]:
        prompts, shared_len = torch.tensor(order["prompts"]), order["shared_len"]
        batch = len(prompts)
        cache = DynamicCache(config=model.config)
        start_s = time.perf_counter()
        if shared_len:
            model(prompts[:1, :shared_len], past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(batch)
            prompts = prompts[:, shared_len:]
        tokens = prompts
        first_s = 0.0
        for _ in range(order["output_len"]):
            logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
            first_s = first_s or time.perf_counter()
        last_s = time.perf_counter()
        return protocol.summary(start_s, [first_s] * batch, [last_s] * batch, order["output_len"])

    return run


if __name__ == "__main__":
    protocol.serve(start)
