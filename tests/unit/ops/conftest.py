"""Backends under test: the native operators on every instruction set this machine has."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.ops.cases import ISAS, make_cpu
from xdeepserve.ops import get_ops
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.reference import ReferenceOps


@pytest.fixture(scope="session", params=ISAS)
def cpu(request: pytest.FixtureRequest) -> CpuOps:
    return make_cpu(isa=request.param, num_threads=2)


@pytest.fixture(scope="session")
def reference() -> ReferenceOps:
    ops = get_ops("reference")
    assert isinstance(ops, ReferenceOps)
    return ops


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250807)
