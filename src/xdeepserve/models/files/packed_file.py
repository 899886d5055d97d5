"""The packed weight file: what a backend packed, laid out to be memory-mapped and shared.

    byte 0     magic "XDSPACK\\0"
         8     u32 format version        12  u32 CRC-32 of the header
         16    u64 header offset         24  u64 header length
         32    u32 CRC-32 of bytes 0-31
    4096 ...   data of the entries, each aligned to 4096 bytes
    header     JSON {"key", "config", "entries": [{name, kind, dtype, shape, layout, offset,
               nbytes, crc32}]}, then the end of the file

The first 36 bytes are written last and the file is renamed into place after fsync, so a file under
its final name is complete. Still everything is checked on opening: sizes, checksums of header and
of all data. Trust: the cache folder belongs to the user; checks catch damage, not forgery.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from xdeepserve.errors import ModelFormatError
from xdeepserve.models.huge_pages import map_file
from xdeepserve.ops import Array, PackedWeight, WeightDtype
from xdeepserve.ops.types import U8

FORMAT_VERSION: Final = 1
ALIGNMENT: Final = 4096
MAX_HEADER_BYTES: Final = 1 << 28

_MAGIC: Final = b"XDSPACK\0"
_PRELUDE: Final = struct.Struct("<8sIIQQ")
_CRC: Final = struct.Struct("<I")
_ARRAY_DTYPES: Final = ("float32", "uint16", "int32", "int8", "uint8")


@dataclass(frozen=True, slots=True)
class PackedKey:
    """What the file was made from: another key means another file.

    Attributes:
        digest: SHA-256 of the source files.
        dtype: weight dtype of the model.
        layout: the backend's packed layout id.
        recipe: fingerprint of the code that turns tensors into entries.
    """

    digest: str
    dtype: str
    layout: str
    recipe: str

    @property
    def file_prefix(self) -> str:
        """The name without the recipe: equal for files of which one replaces the other."""
        layout = "".join(char if char.isalnum() else "-" for char in self.layout)
        return f"{self.digest[:32]}-{self.dtype}-{layout}"

    @property
    def file_name(self) -> str:
        return f"{self.file_prefix}-{self.recipe}.pack"


@dataclass(frozen=True, slots=True)
class PackedEntry:
    """One row of the table. `kind` is "linear" (a PackedWeight) or "array"; `layout` is the
    backend's for a linear, empty for an array."""

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    layout: str
    offset: int
    nbytes: int
    crc32: int


class PackedFileWriter:
    """Writes a packed file entry by entry. The caller renames the file after `finish`."""

    def __init__(self, path: Path, key: PackedKey, config: dict[str, Any]) -> None:
        self._key = key
        self._config = config
        self._entries: list[PackedEntry] = []
        self._file = path.open("wb")

    def add_linear(self, name: str, groups: Iterable[PackedWeight]) -> PackedEntry:
        """Append the groups of one linear weight, each already packed with G = 1."""
        offset = self._align()
        crc, nbytes, num_groups = 0, 0, 0
        first: PackedWeight | None = None
        for group in groups:
            first = first or group
            assert group.shape == first.shape, f"{name}: groups differ in shape"
            crc = zlib.crc32(group.data.data, crc)
            nbytes += self._file.write(group.data.data)
            num_groups += group.shape[0]
        assert first is not None, f"{name} has no groups"
        shape = (num_groups, *first.shape[1:])
        return self._record(
            PackedEntry(name, "linear", first.dtype.value, shape, first.layout, offset, nbytes, crc)
        )

    def add_array(self, name: str, values: Array) -> PackedEntry:
        """Append a plain array."""
        assert values.dtype.name in _ARRAY_DTYPES, f"{name}: dtype {values.dtype}"
        offset = self._align()
        data = np.ascontiguousarray(values)
        self._file.write(data.data)
        crc = zlib.crc32(data.data)
        entry = PackedEntry(
            name, "array", data.dtype.name, data.shape, "", offset, data.nbytes, crc
        )
        return self._record(entry)

    def finish(self) -> None:
        """Write header and prelude, flush to disk, close."""
        entries = [asdict(entry) for entry in self._entries]
        header = {"key": asdict(self._key), "config": self._config, "entries": entries}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        offset = self._align()
        self._file.write(encoded)
        prelude = _PRELUDE.pack(_MAGIC, FORMAT_VERSION, zlib.crc32(encoded), offset, len(encoded))
        self._file.seek(0)
        self._file.write(prelude + _CRC.pack(zlib.crc32(prelude)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close without finishing. Idempotent."""
        self._file.close()

    def _align(self) -> int:
        position = max(self._file.tell(), _PRELUDE.size + _CRC.size)
        aligned = position + -position % ALIGNMENT
        self._file.seek(aligned)
        return aligned

    def _record(self, entry: PackedEntry) -> PackedEntry:
        self._entries.append(entry)
        return entry


class PackedFile:
    """A packed file, mapped read-only; processes that map it share its pages.

    Args:
        verify: also checksum the data, on all cores. Sizes and header are always checked.

    Raises:
        ModelFormatError: not a complete, undamaged packed file of `key`.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: Path, key: PackedKey, *, verify: bool = True) -> None:
        self.path = path
        size = path.stat().st_size
        if size < ALIGNMENT:
            raise self._damaged(f"{size} bytes are too few")
        self._bytes: U8 = map_file(path)
        header = self._read_header()
        if header.get("key") != asdict(key):
            raise self._damaged(f"it was made from {header.get('key')}, not from {asdict(key)}")
        self.config: dict[str, Any] = header["config"]
        rows = [PackedEntry(**{**row, "shape": tuple(row["shape"])}) for row in header["entries"]]
        self._entries = {row.name: row for row in rows}
        if verify:
            self._verify_data()

    @property
    def nbytes(self) -> int:
        return self._bytes.size

    def linear(self, name: str) -> PackedWeight | None:
        """The packed weight `name` as a view of the map; None if there is no such entry."""
        entry = self._entries.get(name)
        if entry is None or entry.kind != "linear":
            return None
        groups, rows, columns = entry.shape
        shape = (groups, rows, columns)
        return PackedWeight(entry.layout, WeightDtype(entry.dtype), shape, self._data(entry))

    def array(self, name: str) -> Array | None:
        """The array `name` as a read-only view of the map; None if there is no such entry."""
        entry = self._entries.get(name)
        if entry is None or entry.kind != "array":
            return None
        return self._data(entry).view(entry.dtype).reshape(entry.shape)

    def _data(self, entry: PackedEntry) -> U8:
        return self._bytes[entry.offset : entry.offset + entry.nbytes]

    def _read_header(self) -> dict[str, Any]:
        prelude = self._bytes[: _PRELUDE.size].tobytes()
        magic, version, header_crc, offset, length = _PRELUDE.unpack(prelude)
        (prelude_crc,) = _CRC.unpack_from(self._bytes.data, _PRELUDE.size)
        if magic != _MAGIC or zlib.crc32(prelude) != prelude_crc:
            raise self._damaged("the first bytes are wrong")
        if version != FORMAT_VERSION:
            raise self._damaged(f"format version {version} is not {FORMAT_VERSION}")
        if length > MAX_HEADER_BYTES or offset + length != self._bytes.size:
            raise self._damaged(f"its size {self._bytes.size} is not {offset + length}")
        encoded = self._bytes[offset:].tobytes()
        if zlib.crc32(encoded) != header_crc:
            raise self._damaged("the checksum of the header is wrong")
        header: dict[str, Any] = json.loads(encoded)
        return header

    def _verify_data(self) -> None:
        """Checksum every entry; zlib releases the GIL, so threads use all cores."""

        def is_intact(entry: PackedEntry) -> bool:
            return zlib.crc32(self._data(entry).data) == entry.crc32

        entries = list(self._entries.values())
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            for entry, intact in zip(entries, pool.map(is_intact, entries), strict=True):
                if not intact:
                    raise self._damaged(f"the checksum of {entry.name} is wrong")

    def _damaged(self, problem: str) -> ModelFormatError:
        return ModelFormatError(f"cache file {self.path} is damaged: {problem}")
