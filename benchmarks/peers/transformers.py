"""Transformers: plain forward passes over a batch, the baseline everybody has."""

from __future__ import annotations

from dataclasses import asdict
from typing import Final

from benchmarks.peers.environment import Command, Unavailable
from benchmarks.peers.models import checkpoint, converter_python
from benchmarks.peers.peer import Server, Settings, worker_command


class Transformers:
    """Transformers, in the two types that CPUs compute in; float32 where bf16 is emulated."""

    name = "transformers"
    variants: Final = {"16-bit": ("bfloat16", "float32"), "8-bit": (), "4-bit": ()}

    def worker(self, model: str, variant: str, settings: Settings) -> Command:
        """One static batch."""
        order = asdict(settings) | {"model": str(checkpoint(model)), "variant": variant}
        return worker_command(converter_python(), "transformers_worker.py", order)

    def server(self, model: str, variant: str, settings: Settings, port: int) -> Server:
        """None: its continuous batching server is not part of the comparison."""
        raise Unavailable("is compared offline only")
