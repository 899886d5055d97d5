"""Toy models built once per test session."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

from xdeepserve.models.build import build_model
from xdeepserve.models.decoder import Model
from xdeepserve.models.families import parse_spec
from xdeepserve.models.files.checkpoint_writer import write_hf_folder
from xdeepserve.models.files.safetensors_file import TensorPlan
from xdeepserve.models.weights import InMemoryProvider
from xdeepserve.ops import Ops, WeightDtype, get_ops
from xdeepserve.testing.toy_models import ToyCheckpoint, toy_checkpoint


@cache
def toy_model(
    name: str, dtype: str = "float32", backend: str = "reference", num_threads: int = 0
) -> Model:
    """The toy `name` in the given precision and on the given operator backend."""
    return build_toy(name, dtype, get_ops(backend, num_threads=num_threads))


def build_toy(name: str, dtype: str, ops: Ops) -> Model:
    """The toy `name` on the given operators."""
    checkpoint = toy_checkpoint(name)
    return build_model(
        parse_spec(checkpoint.config),
        InMemoryProvider(ops),
        ops,
        checkpoint,
        dtype=WeightDtype(dtype),
    )


def write_toy(folder: Path, checkpoint: ToyCheckpoint) -> None:
    """The toy as a model folder, which must not be there yet."""
    plans = [
        TensorPlan(name, shape, partial(checkpoint.tensor, name))
        for name, shape in checkpoint.shapes.items()
    ]
    write_hf_folder(folder, config=checkpoint.config, tensors=plans, files={})
