"""Databases for tests: a SQLite file, and PostgreSQL where its programs are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xdeepserve.maas.storage.database import Database
from xdeepserve.maas.storage.schema import upgrade

TIMEOUT_S = 60
KINDS = ("sqlite", "postgresql")


def postgres_programs() -> Path | None:
    """The folder of initdb and pg_ctl, which Debian keeps out of PATH."""
    if (found := shutil.which("initdb")) is not None:
        return Path(found).resolve().parent
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return folders[-1] if folders else None


class PostgresCluster:
    """A PostgreSQL of our own, in a folder that goes with it; reached by a Unix socket only."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs = programs
        self._folder = folder
        self._as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self._as_user:
            os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", "xds", "--no-sync")
        self.start()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off"
        log = str(self._folder / "log")
        self._run("pg_ctl", "-D", str(self._data), "-l", log, "-w", "-o", options, "start")

    def stop(self) -> None:
        """At once: clients lose their connections, what was committed stays."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")

    def new_database(self) -> str:
        """URL of an empty database."""
        name = f"test_{uuid.uuid4().hex}"
        self._run("createdb", "-h", str(self._folder), "-U", "xds", name)
        return f"postgresql://xds@/{name}?host={self._folder}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as_user, str(self._programs / program), *arguments]
        # pg_ctl leaves a server behind that would hold a pipe open
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                command, stdout=output, stderr=output, cwd="/", timeout=TIMEOUT_S, check=False
            )
            output.seek(0)
            assert done.returncode == 0, output.read().decode()


@contextmanager
def postgres_cluster() -> Iterator[PostgresCluster]:
    """A running cluster; skips the test where PostgreSQL is not installed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    with tempfile.TemporaryDirectory(prefix="xds-postgres-") as folder:
        cluster = PostgresCluster(programs, Path(folder))
        try:
            yield cluster
        finally:
            cluster.stop()


@contextmanager
def opened(url: str) -> Iterator[Database]:
    """A database with the latest schema."""
    database = Database(url)
    try:
        upgrade(database)
        yield database
    finally:
        database.close()
