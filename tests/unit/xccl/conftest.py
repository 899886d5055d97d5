"""Every test has a run of its own, and none leaves a segment behind."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from tests.unit.xccl.ports import Ranks, native_ranks, reference_ranks
from xdeepserve.xccl import list_segments, unlink_all

_NUMBERS = itertools.count()


@pytest.fixture
def run_id() -> Iterator[str]:
    name = f"test{os.getpid()}.{next(_NUMBERS)}"
    yield name
    left = [info.name for info in list_segments(name)]
    unlink_all(name)
    assert left == [], "segments were not unlinked"


@pytest.fixture(params=["reference", "native"])
def ranks(request: pytest.FixtureRequest, run_id: str) -> Iterator[Ranks]:
    made = reference_ranks() if request.param == "reference" else native_ranks(run_id)
    yield made
    made.close()


@pytest.fixture
def native(run_id: str) -> Iterator[Ranks]:
    """For what the reference does not model."""
    made = native_ranks(run_id)
    yield made
    made.close()
