"""The real model, pulled and upcycled once per machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from xdeepserve import store


@pytest.fixture(scope="session")
def dense_dir() -> Path:
    return store.resolve("smollm2-135m")


@pytest.fixture(scope="session")
def moe_dir() -> Path:
    return store.resolve("smollm2-135m-moe8")
