"""A run of real processes per test; none is left over, and no segment."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from tests.multiproc.xccl.processes import Run
from xdeepserve.xccl import list_segments

_NUMBERS = itertools.count()


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run(f"mp{os.getpid()}.{next(_NUMBERS)}")
    yield made
    made.end()
    assert list_segments(made.run_id) == []
