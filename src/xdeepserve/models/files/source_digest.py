"""Content digest of a model's files, memoised so that a warm start only calls stat.

The memo says: these files, with these sizes, modification times and inodes, had this digest. It is
a hint beside the cache files, rewritten whenever it does not fit; losing it costs one hashing pass.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from xdeepserve.errors import ModelFormatError

Progress = Callable[[str, int, int], None]
"""Called with (stage, bytes done, bytes in total); stages: hash, pack, verify, write, download."""

_CHUNK_BYTES: Final = 1 << 22


def source_digest(
    files: Sequence[Path], *, memo_dir: Path, progress: Progress | None = None
) -> str:
    """SHA-256 (hex) over the names and contents of `files`.

    Args:
        memo_dir: where the memo lives; must exist.

    Raises:
        ModelFormatError: a file cannot be read, or changed while it was read.
    """
    stamps = [_stamp(path) for path in files]
    memo = memo_dir / f"{_sha256(os.path.abspath(files[0]).encode())[:32]}.digest.json"
    known = _read_memo(memo, stamps)
    if known is not None:
        return known
    digest = _hash_files(files, total=sum(stamp[1] for stamp in stamps), progress=progress)
    check_unchanged(files, stamps)
    write_atomically(memo, json.dumps({"files": stamps, "digest": digest}).encode())
    return digest


def file_sha256(path: Path, on_read: Callable[[int], None] | None = None) -> str:
    """SHA-256 (hex) of one file; `on_read` gets the length of each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_read is not None:
                on_read(len(chunk))
    return digest.hexdigest()


def stamp_files(files: Sequence[Path]) -> list[list[Any]]:
    """[path, size, mtime_ns, inode] of each file: changes when a file changes."""
    return [_stamp(path) for path in files]


def check_unchanged(files: Sequence[Path], stamps: list[list[Any]]) -> None:
    """Raise ModelFormatError if a file is no longer as `stamps` says."""
    for path, stamp in zip(files, stamps, strict=True):
        if _stamp(path) != stamp:
            raise ModelFormatError(f"{path} changed while it was being read; try again")


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: readers see the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _stamp(path: Path) -> list[Any]:
    try:
        stat = path.stat()
    except OSError as exc:
        raise ModelFormatError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _read_memo(memo: Path, stamps: list[list[Any]]) -> str | None:
    try:
        known = json.loads(memo.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(known, dict) or known.get("files") != stamps:
        return None
    digest = known.get("digest")
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _hash_files(files: Sequence[Path], *, total: int, progress: Progress | None) -> str:
    done = 0

    def on_read(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress("hash", done, total)

    lines = [f"{path.name} {file_sha256(path, on_read)}\n" for path in files]
    return _sha256("".join(lines).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
