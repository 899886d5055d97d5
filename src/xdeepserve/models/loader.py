"""load_model: a checkpoint on disk -> a Model over a shared, memory-mapped packed file.

    path -> stat -> digest (memo) -> packed file? -- yes --> map it -------------> build_model
                                          no, or damaged
                                          +--> lock -> read, pack, write, rename -> map it

A warm load reads the memo and the packed file; of the source it only asks size and times.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from xdeepserve import envs
from xdeepserve.errors import ModelFormatError
from xdeepserve.models import build, build_attention, checkpoint, families, quantize, weights
from xdeepserve.models.build import build_model
from xdeepserve.models.checkpoint import FileCheckpoint, open_checkpoint
from xdeepserve.models.checkpoint_api import ArrayLoader, LinearLoader
from xdeepserve.models.decoder import Model
from xdeepserve.models.families import parse_spec, without_absent_mtp
from xdeepserve.models.files import gguf_file, gguf_llama, number_formats, safetensors_file
from xdeepserve.models.files.checkpoint_writer import home_error, make_home_folder
from xdeepserve.models.files.file_lock import file_lock
from xdeepserve.models.files.packed_file import PackedFile, PackedFileWriter, PackedKey
from xdeepserve.models.files.source_digest import (
    Progress,
    check_unchanged,
    source_digest,
    stamp_files,
)
from xdeepserve.models.spec import ModelSpec
from xdeepserve.ops import F32, Array, Ops, PackedWeight, WeightDtype, quant
from xdeepserve.ops.types import U8

LOCK_TIMEOUT_S: Final = 3600.0
STALE_AFTER_S: Final = 86400.0

_RECIPE_MODULES: Final = (
    build, build_attention, checkpoint, families, gguf_file, gguf_llama, number_formats, quant,
    quantize, safetensors_file, weights,
)  # fmt: skip
"""The code that decides what is in a packed file; when it changes, files are made anew."""

_log = logging.getLogger(__name__)


def load_model(
    path: Path,
    *,
    dtype: WeightDtype,
    ops: Ops,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    max_positions: int = 0,
    verify: bool = True,
) -> Model:
    """Load the model at `path`, packing its weights into the cache if they are not there yet.

    Processes that load the same model share the mapped pages; of several that find no cache file
    one packs and the others wait.

    Args:
        path: Hugging Face folder or GGUF file.
        cache_dir: where packed files live; None = XDEEPSERVE_HOME/packed.
        progress: called with (stage, bytes done, bytes in total).
        max_positions: longest context the rope table is made for; 0 = what the model supports.
        verify: checksum the packed weights; False when a process that shares the map has done so.

    Raises:
        ModelFormatError: damaged or unsupported model; a tensor missing or of the wrong shape.
        ConfigError: no model there, or the cache folder cannot be written.
        DeadlineExceeded: another process packed for longer than an hour.
    """
    source = open_checkpoint(path)
    directory = make_home_folder(cache_dir or envs.HOME.get() / "packed")
    try:
        key = PackedKey(
            digest=source_digest(source.files, memo_dir=directory, progress=progress),
            dtype=dtype.value,
            layout=ops.layout,
            recipe=_recipe(),
        )
        packed = _open(directory, key, verify=verify)
        if packed is None:
            with file_lock(directory / f"{key.file_name}.lock", timeout_s=LOCK_TIMEOUT_S):
                packed = _open(directory, key, verify=verify) or _pack(
                    source, directory, key, ops, progress
                )
    except OSError as exc:
        raise home_error(directory, exc) from exc
    spec = parse_spec(packed.config)
    provider = PackedProvider(packed)
    return build_model(spec, provider, ops, dtype=dtype, max_positions=max_positions)


class PackedProvider:
    """WeightProvider over a packed file: hands out views of the map, reads nothing else."""

    def __init__(self, packed: PackedFile) -> None:
        self._packed = packed

    def linear(self, name: str, load: LinearLoader, dtype: WeightDtype) -> PackedWeight:
        """The packed linear `name`."""
        weight = self._packed.linear(name)
        if weight is None:
            raise self._lacking(name)
        if weight.dtype.has_int8_weights and dtype.has_int8_weights:
            return replace(weight, dtype=dtype)
        if weight.dtype is not dtype:
            raise self._lacking(name)
        return weight

    def array(self, name: str, load: ArrayLoader) -> Array:
        """The array `name`."""
        values = self._packed.array(name)
        if values is None:
            raise self._lacking(name)
        return values

    def _lacking(self, name: str) -> ModelFormatError:
        return ModelFormatError(f"cache file {self._packed.path} lacks {name}; delete the file")


class PackingProvider:
    """WeightProvider that packs every weight into a file as it is asked for.

    The linears it returns have shape and dtype but no memory behind their data: the model built
    over them must be thrown away, and the finished file mapped instead.
    """

    def __init__(self, writer: PackedFileWriter, ops: Ops) -> None:
        self._writer = writer
        self._ops = ops

    def linear(self, name: str, load: LinearLoader, dtype: WeightDtype) -> PackedWeight:
        """Pack `name` group by group and append it."""
        loaded = load()
        groups = _groups(loaded) if isinstance(loaded, np.ndarray) else loaded
        entry = self._writer.add_linear(
            name, (self._ops.pack(group, dtype=dtype) for group in groups)
        )
        count, rows, columns = entry.shape
        nothing: U8 = np.broadcast_to(np.uint8(0), (entry.nbytes,))
        return PackedWeight(entry.layout, dtype, (count, rows, columns), nothing)

    def array(self, name: str, load: ArrayLoader) -> Array:
        """Append the array `name`."""
        values = load()
        self._writer.add_array(name, values)
        return values


class TrackedCheckpoint:
    """A checkpoint that counts what is read: for progress, and to find tensors nobody asked for."""

    def __init__(self, source: FileCheckpoint, progress: Progress | None) -> None:
        self._source = source
        self._progress = progress
        self._unread = set(source.names())
        self._total = sum(_num_values(source.shape(name)) for name in self._unread) * 4
        self._done = 0

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        return self._source.config

    @property
    def unread(self) -> set[str]:
        """Names of tensors that were never read."""
        return self._unread

    def names(self) -> frozenset[str]:
        """Hugging Face tensor names."""
        return self._source.names()

    def tensor(self, name: str) -> F32:
        """The tensor as float32; refuses values that are not finite."""
        values = self._source.tensor(name)
        if not np.isfinite(values).all():
            raise ModelFormatError(
                f"{self._source.files[-1].parent}: tensor {name} holds values that are not finite"
            )
        if name in self._unread:
            self._unread.discard(name)
            self._done += values.nbytes
            if self._progress is not None:
                self._progress("pack", self._done, self._total)
        return values


def _open(directory: Path, key: PackedKey, *, verify: bool) -> PackedFile | None:
    """The packed file of `key`; None if there is none. A damaged one is reported as none."""
    try:
        return PackedFile(directory / key.file_name, key, verify=verify)
    except FileNotFoundError:
        return None
    except ModelFormatError as exc:
        _log.warning("%s; it is made anew", exc)
        return None


def _pack(
    source: FileCheckpoint, directory: Path, key: PackedKey, ops: Ops, progress: Progress | None
) -> PackedFile:
    """Write the packed file of `key`. The caller holds its lock, so the temporary is ours alone."""
    _remove_stale(directory)
    stamps = stamp_files(source.files)
    tracked = TrackedCheckpoint(source, progress)
    config = without_absent_mtp(source.config, source.names())
    spec = parse_spec(config)
    temporary = directory / f"{key.file_name}.tmp"
    writer = PackedFileWriter(temporary, key, config)
    try:
        build_model(spec, PackingProvider(writer, ops), ops, tracked, dtype=WeightDtype(key.dtype))
        writer.finish()
        check_unchanged(source.files, stamps)
        _warn_unread(tracked.unread, spec)
        packed = PackedFile(temporary, key, verify=False)
        temporary.rename(directory / key.file_name)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)
    _remove_predecessors(directory, key)
    return packed


def _groups(weight: F32) -> Iterator[F32]:
    """[N, K] as one group, [G, N, K] as G groups."""
    stack = weight[None] if weight.ndim == 2 else weight
    return iter(stack)


def _warn_unread(names: set[str], spec: ModelSpec) -> None:
    known = {"lm_head.weight"} if spec.tie_embeddings else set()
    if spec.has_mtp:  # copies of the main model's
        prefix = f"model.layers.{spec.num_layers}"
        known |= {f"{prefix}.embed_tokens.weight", f"{prefix}.shared_head.head.weight"}
    unknown = sorted(name for name in names - known if not name.endswith("rotary_emb.inv_freq"))
    if unknown:
        _log.warning(
            "%d tensors of the checkpoint are not used by this architecture: %s%s",
            len(unknown),
            ", ".join(unknown[:3]),
            ", ..." if len(unknown) > 3 else "",
        )


def _remove_stale(directory: Path) -> None:
    """Remove temporaries that a killed process left more than a day ago."""
    oldest = time.time() - STALE_AFTER_S
    for leftover in sorted(directory.glob("*.tmp"))[:64]:
        if leftover.stat().st_mtime < oldest:
            leftover.unlink(missing_ok=True)


def _recipe() -> str:
    """Checksum of the source of _RECIPE_MODULES; of a package, of all its files."""
    paths: list[Path] = []
    for module in _RECIPE_MODULES:
        path = Path(module.__file__ or "")
        paths += sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    crc = 0
    for path in paths:
        crc = zlib.crc32(path.read_bytes(), crc)
    return f"{crc:08x}"


def _remove_predecessors(directory: Path, key: PackedKey) -> None:
    """Remove what older code packed from the same weights; who has it mapped keeps it."""
    for path in directory.glob(f"{key.file_prefix}-*.pack"):
        if path.name != key.file_name:
            path.unlink(missing_ok=True)


def _num_values(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
