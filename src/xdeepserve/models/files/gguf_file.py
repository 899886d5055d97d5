"""GGUF files: bounded parsing of the metadata and the tensor table, and dequantization.

    magic "GGUF" | u32 version | u64 tensor count | u64 metadata count
    metadata: (string key, u32 type, value) ...
    tensors:  (string name, u32 dims, u64 dim ..., u32 type, u64 offset) ...
    padding to general.alignment, then the data

Counts and lengths are untrusted: each is compared with the bytes that remain before anything is
allocated or looped over. Dequantization is the `gguf` package's.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from xdeepserve.errors import ModelFormatError
from xdeepserve.models.files.number_formats import U8, to_float32
from xdeepserve.models.files.safetensors_file import TensorEntry
from xdeepserve.ops import F32

MAX_STRING_BYTES: Final = 1 << 24
MAX_ARRAY_ITEMS: Final = 1 << 23
MAX_TABLE_ROWS: Final = 1 << 20
MAX_DIMS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20
DEFAULT_ALIGNMENT: Final = 32

_SCALARS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9


@dataclass(frozen=True, slots=True)
class GGMLType:
    """A tensor number format: `block` values are stored in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


GGML_TYPES: Final = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    30: GGMLType("BF16", 1, 2),
}


class GGUFFile:
    """One GGUF file (version 2 or 3, little-endian), memory-mapped read-only.

    Attributes:
        metadata: key -> number, bool, string or list of these.
        entries: tensor name -> type name, shape ([out, in]) and byte range.

    Raises:
        ModelFormatError: the file cannot be read, is truncated, or its tables lie.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size < 24:
                raise ModelFormatError(f"{path}: too short for a GGUF file")
            self._bytes: U8 = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as exc:
            raise ModelFormatError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
        cursor = _Cursor(path, self._bytes.data)
        num_tensors, num_metadata = _read_preamble(cursor)
        self.metadata = _read_metadata(cursor, num_metadata)
        self.entries = _read_tensor_table(cursor, num_tensors, self._alignment())

    def tensor(self, name: str) -> F32:
        """The values of `name`, dequantized to float32."""
        entry = self.entries[name]
        raw = np.asarray(self._bytes[entry.offset : entry.offset + entry.nbytes])
        if entry.dtype in ("F32", "F16", "BF16"):
            return to_float32(raw, entry.dtype).reshape(entry.shape)
        # The package costs 0.2 s to import and is needed for quantized tensors only.
        from gguf import GGMLQuantizationType, dequantize

        rows = raw.reshape(*entry.shape[:-1], -1)
        values = dequantize(rows, GGMLQuantizationType[entry.dtype])
        return np.ascontiguousarray(values, dtype=np.float32).reshape(entry.shape)

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise ModelFormatError(
                f"{self.path}: general.alignment={value!r} must be a power of two "
                f"up to {MAX_ALIGNMENT}"
            )
        return value


class _Cursor:
    """Reads forward through a file and refuses to read past its end."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path = path
        self.view = view
        self.position = 0

    @property
    def remaining(self) -> int:
        return len(self.view) - self.position

    def fail(self, message: str) -> ModelFormatError:
        return ModelFormatError(f"{self.path}: {message} (at byte {self.position})")

    def take(self, count: int, what: str) -> bytes:
        if count > self.remaining:
            raise self.fail(
                f"{what} needs {count} bytes, {self.remaining} remain; the file is truncated"
            )
        start = self.position
        self.position += count
        return bytes(self.view[start : self.position])

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, *, limit: int, min_bytes: int) -> int:
        """A u64 count of items of at least `min_bytes` each."""
        value = self.u64(what)
        if value > limit:
            raise self.fail(f"{what}={value} exceeds the limit of {limit}")
        if value * min_bytes > self.remaining:
            raise self.fail(
                f"{what}={value} does not fit in the {self.remaining} bytes that remain"
            )
        return value

    def string(self, what: str) -> str:
        length = self.count(f"length of {what}", limit=MAX_STRING_BYTES, min_bytes=1)
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise self.fail(f"{what} is not valid UTF-8") from exc


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    if cursor.take(4, "magic") != b"GGUF":
        raise cursor.fail("not a GGUF file (wrong magic)")
    version = cursor.u32("version")
    if version not in (2, 3):
        hint = "; big-endian files are not read" if version & 0xFFFF == 0 else ""
        raise cursor.fail(f"GGUF version {version} is not supported, only 2 and 3{hint}")
    num_tensors = cursor.count("tensor count", limit=MAX_TABLE_ROWS, min_bytes=24)
    num_metadata = cursor.count("metadata count", limit=MAX_TABLE_ROWS, min_bytes=13)
    return num_tensors, num_metadata


def _read_metadata(cursor: _Cursor, num_metadata: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_metadata):
        key = cursor.string("metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} occurs twice")
        metadata[key] = _read_value(cursor, key, cursor.u32(f"type of {key}"))
    return metadata


def _read_value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string(key)
    if kind == _ARRAY:
        return _read_array(cursor, key)
    dtype = _scalar_dtype(cursor, key, kind)
    return np.frombuffer(cursor.take(dtype.itemsize, key), dtype)[0].item()


def _read_array(cursor: _Cursor, key: str) -> list[Any]:
    kind = cursor.u32(f"item type of {key}")
    if kind == _STRING:
        count = cursor.count(f"items of {key}", limit=MAX_ARRAY_ITEMS, min_bytes=8)
        return _read_strings(cursor, key, count)
    dtype = _scalar_dtype(cursor, key, kind)
    count = cursor.count(f"items of {key}", limit=MAX_ARRAY_ITEMS, min_bytes=dtype.itemsize)
    values: list[Any] = np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype).tolist()
    return values


def _read_strings(cursor: _Cursor, key: str, count: int) -> list[str]:
    """`count` strings; inlined because vocabularies have hundreds of thousands."""
    view, position, end = cursor.view, cursor.position, len(cursor.view)
    unpack = struct.Struct("<Q").unpack_from
    strings = []
    try:
        for _ in range(count):
            (length,) = unpack(view, position)
            stop = position + 8 + length
            if stop > end:
                raise cursor.fail(f"a string of {key} is {length} bytes long, beyond the file end")
            strings.append(str(view[position + 8 : stop], "utf-8"))
            position = stop
    except struct.error as exc:
        raise cursor.fail(f"{key} ends early; the file is truncated") from exc
    except UnicodeDecodeError as exc:
        raise cursor.fail(f"a string of {key} is not valid UTF-8") from exc
    cursor.position = position
    return strings


def _scalar_dtype(cursor: _Cursor, key: str, kind: int) -> np.dtype[Any]:
    if kind not in _SCALARS:
        raise cursor.fail(f"{key} has unsupported metadata type {kind}")
    return np.dtype(_SCALARS[kind])


def _read_tensor_table(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorEntry]:
    rows: dict[str, TensorEntry] = {}
    for _ in range(count):
        name = cursor.string("tensor name")
        if name in rows:
            raise cursor.fail(f"tensor {name} occurs twice")
        rows[name] = _read_tensor_row(cursor, name, alignment)
    data_start = cursor.position + -cursor.position % alignment
    entries = {
        name: TensorEntry(row.dtype, row.shape, data_start + row.offset, row.nbytes)
        for name, row in rows.items()
    }
    _check_layout(entries, cursor)
    return entries


def _read_tensor_row(cursor: _Cursor, name: str, alignment: int) -> TensorEntry:
    num_dims = cursor.u32(f"dimensions of {name}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.fail(f"tensor {name} has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed")
    dims = [cursor.u64(f"dimension of {name}") for _ in range(num_dims)]
    type_id = cursor.u32(f"type of {name}")
    offset = cursor.u64(f"offset of {name}")
    if type_id not in GGML_TYPES:
        known = ", ".join(known_type.name for known_type in GGML_TYPES.values())
        raise cursor.fail(f"tensor {name} has type id {type_id}; supported are {known}")
    kind = GGML_TYPES[type_id]
    if min(dims) < 1 or dims[0] % kind.block:
        raise cursor.fail(
            f"tensor {name} of shape {dims} does not divide into {kind.name} blocks of {kind.block}"
        )
    if offset % alignment:
        raise cursor.fail(f"tensor {name}: offset {offset} is not a multiple of {alignment}")
    nbytes = math.prod(dims) // kind.block * kind.nbytes
    return TensorEntry(kind.name, tuple(reversed(dims)), offset, nbytes)


def _check_layout(entries: dict[str, TensorEntry], cursor: _Cursor) -> None:
    size = len(cursor.view)
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        if entry.offset < end:
            raise cursor.fail(f"tensor {name} overlaps its predecessor")
        end = entry.offset + entry.nbytes
        if end > size:
            raise cursor.fail(
                f"tensor {name} ends at byte {end}, beyond the file size {size}; "
                "the file is truncated or its table lies"
            )
