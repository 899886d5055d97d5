"""A folder that sockets may lie in."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Short (socket paths are limited) and private."""
    with tempfile.TemporaryDirectory(prefix="xds-") as name:
        yield Path(name)
