"""A world of module servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.module_threads import ModuleThreads
from tests.toys import toy_model
from tests.unit.transformerless.exchanges import HALVES


@pytest.fixture
def world() -> Iterator[ModuleThreads]:
    """An FFN server, and two expert servers with half of the experts each."""
    made = ModuleThreads(toy_model("glm4_moe"), num_ffn=1, placement=HALVES)
    yield made
    made.close()
