"""A database of each kind that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import KINDS, PostgresCluster, opened, postgres_cluster
from xdeepserve.maas.storage.database import Database


@pytest.fixture(scope="session")
def cluster() -> Iterator[PostgresCluster]:
    with postgres_cluster() as running:
        yield running


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that is there, or will be made, and is empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'service.db'}"
    found: PostgresCluster = request.getfixturevalue("cluster")
    return found.new_database()


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with opened(database_url) as found:
        yield found
