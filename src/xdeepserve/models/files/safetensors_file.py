"""Safetensors files: a validating memory-mapped reader and a streaming writer.

    [8 bytes little-endian header length n][n bytes JSON header][tensor bytes, no holes]

The header is untrusted: its length, its depth, and each tensor's dtype, shape and offsets are
checked against each other and against the file size before a byte of data is touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TypeGuard

import numpy as np

from xdeepserve.errors import ModelFormatError
from xdeepserve.models.files.number_formats import (
    FLOAT_DTYPES,
    ITEM_BYTES,
    U8,
    from_float32,
    to_float32,
)
from xdeepserve.ops import F32

MAX_HEADER_BYTES: Final = 100_000_000
MAX_DIMS: Final = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One row of a tensor table: dtype name, shape, and the byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written: its values are asked for when its turn comes.

    Attributes:
        name: Hugging Face name.
        shape: must equal `load().shape`.
        load: gives the float32 values.
        dtype: "F32", "F16" or "BF16" on disk.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], F32]
    dtype: str = "BF16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class SafetensorsFile:
    """One safetensors file, memory-mapped read-only, its table validated on opening.

    Raises:
        ModelFormatError: the file cannot be read, is truncated, or its table lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                header_bytes, data_start = _read_header(file, path, size)
            self._bytes: U8 = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as exc:
            raise ModelFormatError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
        self.entries = _parse_table(_parse_json(header_bytes, path), path, data_start, size)

    def tensor(self, name: str) -> F32:
        """The values of `name` as a float32 copy (FP8 without its scales)."""
        entry = self.entries[name]
        if entry.dtype not in FLOAT_DTYPES:
            raise ModelFormatError(
                f"{self.path}: tensor {name} has dtype {entry.dtype}; "
                f"weights must be one of {', '.join(FLOAT_DTYPES)}"
            )
        raw = np.asarray(self._bytes[entry.offset : entry.offset + entry.nbytes])
        return to_float32(raw, entry.dtype).reshape(entry.shape)


def write_safetensors(
    path: Path, plans: Sequence[TensorPlan], on_written: Callable[[int], None] | None = None
) -> None:
    """Write `plans` in order, one tensor in memory at a time.

    Args:
        on_written: called with the data bytes written so far.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in plans:
        span = [offset, offset + plan.nbytes]
        header[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for plan in plans:
            done += file.write(_encode(plan).data)
            if on_written is not None:
                on_written(done)


def _encode(plan: TensorPlan) -> U8:
    values = plan.load()
    assert values.shape == plan.shape, f"{plan.name}: {values.shape} is not {plan.shape}"
    return from_float32(values, plan.dtype)


def _read_header(file: IO[bytes], path: Path, size: int) -> tuple[bytes, int]:
    if size < 8:
        raise ModelFormatError(f"{path}: {size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise ModelFormatError(
            f"{path}: header length {length} exceeds the limit of {MAX_HEADER_BYTES} bytes"
        )
    if length > size - 8:
        raise ModelFormatError(
            f"{path}: header length {length} exceeds the file size {size}; the file is truncated"
        )
    return file.read(length), 8 + length


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed: dict[str, Any] = {}
        for name, value in pairs:
            if name in parsed:
                raise ModelFormatError(f"{path}: {name!r} occurs twice in the header")
            parsed[name] = value
        return parsed

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=reject_duplicates)
    except (ValueError, RecursionError) as exc:
        raise ModelFormatError(f"{path}: the header is not valid JSON ({exc})") from exc
    if not isinstance(header, dict):
        raise ModelFormatError(f"{path}: the header must be a JSON object")
    return header


def _parse_table(
    header: dict[str, Any], path: Path, data_start: int, size: int
) -> dict[str, TensorEntry]:
    entries = {
        name: _parse_entry(name, row, path, data_start)
        for name, row in header.items()
        if name != "__metadata__"
    }
    _check_layout(entries.items(), path, data_start, size)
    return entries


def _parse_entry(name: str, row: Any, path: Path, data_start: int) -> TensorEntry:
    where = f"{path}: tensor {name}"
    if not isinstance(row, dict):
        raise ModelFormatError(f"{where}: its table row must be an object")
    dtype, shape, span = row.get("dtype"), row.get("shape"), row.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ModelFormatError(
            f"{where}: dtype {dtype!r} is unknown; known are {', '.join(ITEM_BYTES)}"
        )
    if not _is_int_list(shape) or len(shape) > MAX_DIMS:
        raise ModelFormatError(
            f"{where}: shape {shape!r} must be a list of at most {MAX_DIMS} integers >= 0"
        )
    if not _is_int_list(span) or len(span) != 2 or span[0] > span[1]:
        raise ModelFormatError(f"{where}: data_offsets {span!r} must be [begin, end]")
    nbytes = span[1] - span[0]
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if nbytes != expected:
        raise ModelFormatError(
            f"{where}: {nbytes} bytes do not hold shape {shape} of {dtype} ({expected} bytes)"
        )
    return TensorEntry(dtype, tuple(shape), data_start + span[0], nbytes)


def _is_int_list(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(
    entries: Iterable[tuple[str, TensorEntry]], path: Path, data_start: int, size: int
) -> None:
    """Tensors must follow each other without overlap or hole and end where the file ends."""
    end = data_start
    for name, entry in sorted(entries, key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != end:
            problem = "overlaps its predecessor" if entry.offset < end else "leaves a hole before"
            raise ModelFormatError(
                f"{path}: tensor {name} at byte {entry.offset} {problem} (expected {end})"
            )
        end = entry.offset + entry.nbytes
        if end > size:
            raise ModelFormatError(
                f"{path}: tensor {name} ends at byte {end}, beyond the file size {size}; "
                "the file is truncated"
            )
    if end != size:
        raise ModelFormatError(f"{path}: the file has {size} bytes, its table describes {end}")
