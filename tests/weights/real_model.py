"""Real models, loaded and checked once per test session."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from xdeepserve.models.decoder import Model
from xdeepserve.models.loader import load_model
from xdeepserve.ops import WeightDtype, get_ops


@cache
def real_model(folder: Path, dtype: WeightDtype) -> Model:
    """The model in `folder` on the native operators, with two threads.

    Its weights are mapped, so that keeping it costs next to nothing.
    """
    return load_model(folder, dtype=dtype, ops=get_ops("cpu", num_threads=2))
