"""This project as an engine of the comparison: the tree the benchmark runs in."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Final

from benchmarks.peers.environment import Command, Unavailable
from benchmarks.peers.models import checkpoint
from benchmarks.peers.peer import Server, Settings, worker_command

from xdeepserve.config import DTYPES

OURS: Final = "xdeepserve"


class XDeepServe:
    """Ourselves. With weights of 8 and 4 bits the KV cache has 8, where it is not of latents."""

    name = OURS
    variants: Final = {"16-bit": ("bf16",), "8-bit": ("int8",), "4-bit": ("int4",)}

    def worker(self, model: str, variant: str, settings: Settings) -> Command:
        """A colocated engine, stepped by hand."""
        _check(variant)
        order = asdict(settings) | {
            "model": str(checkpoint(model)),
            "variant": variant,
            "kv_cache_dtype": _kv_cache_dtype(model, variant),
            "engine": {"prefix_caching": settings.prefix_caching},
        }
        return worker_command(sys.executable, "xdeepserve_worker.py", order)

    def server(self, model: str, variant: str, settings: Settings, port: int) -> Server:
        """`serve` as a user starts it."""
        _check(variant)
        path = checkpoint(model)
        argv = (sys.executable, "-m", "xdeepserve.launch.cli", "serve", str(path))
        argv += ("--dtype", variant, "--kv-cache-dtype", _kv_cache_dtype(model, variant))
        argv += ("--port", str(port))
        argv += ("--max-num-seqs", str(settings.max_seqs))
        return Server(Command(argv, {}), port, path.name)


def _kv_cache_dtype(model: str, variant: str) -> str:
    config = json.loads((checkpoint(model) / "config.json").read_text())
    return "auto" if variant == "bf16" or "kv_lora_rank" in config else "int8"


def _check(variant: str) -> None:
    if variant not in DTYPES:
        raise Unavailable(f"has no {variant} weights")
