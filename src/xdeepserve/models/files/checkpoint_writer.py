"""Folders written whole or not at all; write_hf_folder: a Hugging Face checkpoint folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xdeepserve.errors import ConfigError
from xdeepserve.models.files.safetensors_file import TensorPlan, write_safetensors


def make_home_folder(folder: Path) -> Path:
    """Create `folder` (somewhere under XDEEPSERVE_HOME) and its parents; returns it.

    Raises:
        ConfigError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise home_error(folder, exc) from exc
    return folder


def home_error(folder: Path, cause: OSError) -> ConfigError:
    """The error for a folder under XDEEPSERVE_HOME that cannot be written."""
    return ConfigError(
        f"{folder} cannot be used: {cause.strerror or cause}; free some space or set "
        "XDEEPSERVE_HOME to another folder"
    )


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A hidden empty folder beside `dst`, renamed to `dst` at the end of the `with` block.

    After an exception nothing is left behind.

    Raises:
        ConfigError: `dst` exists, or cannot be written.
    """
    if dst.exists():
        raise ConfigError(f"{dst} exists already; choose another name or remove it first")
    temporary: Path | None = None
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", suffix=".tmp", dir=dst.parent))
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, dst)
    except OSError as exc:
        raise ConfigError(f"{dst} cannot be written: {exc.strerror or exc}") from exc
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_hf_folder(
    dst: Path,
    *,
    config: Mapping[str, Any],
    tensors: Sequence[TensorPlan],
    files: Mapping[str, bytes],
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write config.json, model.safetensors and `files` (tokenizer and the like) into `dst`.

    One tensor is in memory at a time; `dst` is there complete or not at all.

    Args:
        files: plain file name -> content.
        on_progress: called with (bytes written, total bytes) of the weights.

    Raises:
        ConfigError: `dst` exists, or cannot be written.
    """
    total = sum(plan.nbytes for plan in tensors)

    def on_written(done: int) -> None:
        if on_progress is not None:
            on_progress(done, total)

    with new_folder(dst) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_safetensors(folder / "model.safetensors", tensors, on_written)
