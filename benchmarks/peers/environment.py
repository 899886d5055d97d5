"""Where engines live: one folder each, with a virtual environment of pinned packages.

A folder is built once; a stamp beside it holds what it was built from.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xdeepserve import envs

BUILD_TIMEOUT_S: Final = 3600.0
TAIL_LINES: Final = 5
GIT_TIMEOUT_S: Final = 10.0


class Unavailable(Exception):
    """An engine cannot run a model here; the message is the reason that the table shows."""


@dataclass(frozen=True, slots=True)
class Command:
    """A program with its arguments and what it adds to the environment."""

    argv: tuple[str, ...]
    env: Mapping[str, str]

    @property
    def environ(self) -> dict[str, str]:
        """The whole environment."""
        return os.environ | dict(self.env)


def peers_folder() -> Path:
    """Where the engines and the converted models are kept."""
    return envs.HOME.get() / "peers"


def head_commit() -> str:
    """The commit of this tree, in short; empty when it is none of git's."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(git, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    return done.stdout.strip()


def build(argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
    """Run one step of a build.

    Raises:
        Unavailable: it failed; carries its last lines.
    """
    done = subprocess.run(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=BUILD_TIMEOUT_S,
        env=os.environ | dict(env or {}),
    )
    if done.returncode != 0:
        tail = " | ".join(done.stdout.strip().splitlines()[-TAIL_LINES:])
        raise Unavailable(f"{Path(argv[0]).name} {argv[1]} failed: {tail}")


def is_built(folder: Path, recipe: str) -> bool:
    """Whether `folder` was built from `recipe`."""
    stamp = folder / "recipe.txt"
    return stamp.is_file() and stamp.read_text() == recipe


def mark_built(folder: Path, recipe: str) -> None:
    """Record that `folder` was built from `recipe`."""
    (folder / "recipe.txt").write_text(recipe)


def virtual_environment(
    name: str, requirements: Sequence[str], *, no_deps: Sequence[str] = ()
) -> Path:
    """The Python of the environment `name`, made when it is not there or its pins changed.

    Args:
        requirements: pinned packages.
        no_deps: pinned packages that are installed after those, without what they ask for.

    Raises:
        Unavailable: a package could not be installed.
    """
    folder = peers_folder() / name
    python = folder / "venv" / "bin" / "python"
    recipe = "\n".join((sys.version, *requirements, *(f"{name} --no-deps" for name in no_deps)))
    if is_built(folder, recipe):
        return python
    print(f"making the environment {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    build([sys.executable, "-m", "venv", "--clear", str(folder / "venv")])
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    build([*pip, *requirements])
    if no_deps:
        build([*pip, "--no-deps", *no_deps])
    mark_built(folder, recipe)
    return python
