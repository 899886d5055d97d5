"""The only place that reads `os.environ`: a typed registry, bad values raise ConfigError.

Use: `envs.ISA.get()`; in tests `with envs.ISA.override("avx2"): ...`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, NoReturn, TypeVar

from xdeepserve.errors import ConfigError

T = TypeVar("T")


class Env(Generic[T]):
    """One documented environment variable with a parser and a default."""

    def __init__(
        self, name: str, parse: Callable[[str], T], default: T | Callable[[], T], doc: str
    ) -> None:
        self.name = name
        self.doc = doc
        self._parse = parse
        self._default = default

    def get(self) -> T:
        """Parsed value, or the default when unset or empty.

        Raises:
            ConfigError: the value does not parse.
        """
        raw = os.environ.get(self.name, "")
        if not raw:
            return self._default() if callable(self._default) else self._default
        try:
            return self._parse(raw)
        except ValueError as exc:
            raise ConfigError(f"environment variable {self.name}={raw!r}: {exc}") from exc

    def export(self, value: str) -> None:
        """Set the variable for this process and those that it starts."""
        self._write(value)

    @contextmanager
    def override(self, value: str | None) -> Iterator[None]:
        """Set (or, with None, unset) the variable inside a `with` block."""
        before = os.environ.get(self.name)
        self._write(value)
        try:
            yield
        finally:
            self._write(before)

    def _write(self, value: str | None) -> None:
        if value is None:
            os.environ.pop(self.name, None)
        else:
            os.environ[self.name] = value

    def __bool__(self) -> NoReturn:
        raise TypeError(f"use {self.name}.get(): the registry entry itself has no truth value")


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if raw not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return raw

    return parse


def _num_threads(raw: str) -> int:
    value = int(raw)
    if not 1 <= value <= 1024:
        raise ValueError("must be between 1 and 1024")
    return value


def _default_home() -> Path:
    try:
        return Path.home() / ".cache" / "xdeepserve"
    except RuntimeError as exc:
        raise ConfigError(f"no home folder ({exc}); set XDEEPSERVE_HOME to a folder") from exc


HOME: Env[Path] = Env(
    "XDEEPSERVE_HOME",
    Path,
    _default_home,
    "Where pulled models and packed weights live.",
)
RUN_DIR: Env[Path] = Env(
    "XDEEPSERVE_RUN_DIR",
    Path,
    Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()),
    "Where running services keep their sockets and state.",
)
DATABASE_URL: Env[str] = Env(
    "XDEEPSERVE_DATABASE_URL",
    str,
    "",
    "Accounts and bills: sqlite:///PATH or postgresql://...; unset: service.db in the home.",
)
ISA: Env[str] = Env(
    "XDEEPSERVE_ISA",
    _one_of("auto", "portable", "avx2", "avx512", "amx"),
    "auto",
    "Instruction set of the native operators; auto takes the best the machine has.",
)
NUM_THREADS: Env[int | None] = Env(
    "XDEEPSERVE_NUM_THREADS",
    _num_threads,
    None,
    "Threads of the native operators; unset: one per core this process may use.",
)
LOG_LEVEL: Env[str] = Env(
    "XDEEPSERVE_LOG_LEVEL",
    _one_of("debug", "info", "warning", "error"),
    "info",
    "Level of the server's log on stderr.",
)
LOG_FORMAT: Env[str] = Env(
    "XDEEPSERVE_LOG_FORMAT",
    _one_of("text", "json"),
    "text",
    "Format of the server's log on stderr: text, or one JSON object a line.",
)
XCCL_TRACE: Env[str] = Env(
    "XDEEPSERVE_XCCL_TRACE",
    _one_of("off", "on"),
    "off",
    "Whether transfers between workers carry their times, for `xds xccl trace`.",
)

ALL: tuple[Env[Path] | Env[str] | Env[int | None], ...] = (
    HOME,
    RUN_DIR,
    DATABASE_URL,
    ISA,
    NUM_THREADS,
    LOG_LEVEL,
    LOG_FORMAT,
    XCCL_TRACE,
)
