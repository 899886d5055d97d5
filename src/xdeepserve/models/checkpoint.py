"""open_checkpoint: a Hugging Face folder or a GGUF file as a `Checkpoint`.

Opening reads the configuration only; tensor tables are read, and validated in full, when the first
tensor or name is asked for. So a warm start that finds everything in the cache file costs nothing.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

from xdeepserve.errors import ConfigError, ModelFormatError
from xdeepserve.models.checkpoint_api import Checkpoint
from xdeepserve.models.files.gguf_file import GGUFFile
from xdeepserve.models.files.gguf_llama import hf_config, hf_names, hf_tensor
from xdeepserve.models.files.number_formats import scale_blocks
from xdeepserve.models.files.safetensors_file import SafetensorsFile, TensorEntry
from xdeepserve.ops import F32

MAX_CONFIG_BYTES: Final = 1 << 24
MAX_INDEX_BYTES: Final = 1 << 27
MAX_SHARDS: Final = 4096

_SCALE_SUFFIX: Final = "_scale_inv"
_INDEX_NAME: Final = "model.safetensors.index.json"
_GENERATION_NAME: Final = "generation_config.json"


class FileCheckpoint(Checkpoint, Protocol):
    """A checkpoint that lies in files: also knows shapes without reading data, and its files."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file the weights and the configuration come from."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`; reads no data."""
        ...

    def dtype(self, name: str) -> str:
        """Number format of the tensor `name` on disk, for example "BF16" or "Q4_1"."""
        ...

    def main_dtype(self) -> str:
        """The number format of most weight bytes."""
        ...


def open_checkpoint(path: Path) -> FileCheckpoint:
    """Open a Hugging Face folder, a .gguf file, or a folder that holds one .gguf file.

    Raises:
        ConfigError: there is no model at `path`.
        ModelFormatError: the files are damaged, unsupported, or lie.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            return GGUFCheckpoint(path)
        raise ConfigError(f"{path} is a file but not a .gguf file; name a model folder instead")
    if not path.is_dir():
        raise ConfigError(f"{path} does not exist; name a model folder or a .gguf file")
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() and (weight_files(path) or not ggufs):
        return HFCheckpoint(path)
    if len(ggufs) == 1:
        return GGUFCheckpoint(ggufs[0])
    if ggufs:
        names = ", ".join(file.name for file in ggufs[:8])
        raise ConfigError(f"{path} holds {len(ggufs)} GGUF files ({names}); name one of them")
    raise ConfigError(f"{path} holds neither config.json nor a .gguf file; it is not a model")


class HFCheckpoint:
    """A folder with config.json and safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._config = read_json(folder / "config.json", limit=MAX_CONFIG_BYTES)
        self._block = _fp8_block(self._config, folder)
        shards = weight_files(folder)
        if not shards:
            raise ModelFormatError(
                f"{folder} has no *.safetensors file; other weight formats (pickled .bin or .pt "
                "files among them) are not read, convert them to safetensors"
            )
        generation = folder / _GENERATION_NAME
        if generation.is_file():
            _merge_eos(self._config, read_json(generation, limit=MAX_CONFIG_BYTES))
        extra = tuple(file for file in (folder / _INDEX_NAME, generation) if file.is_file())
        self._shards = shards
        self.files: tuple[Path, ...] = (folder / "config.json", *extra, *shards)

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json, its `eos_token_id` joined with generation_config.json's."""
        return self._config

    def names(self) -> frozenset[str]:
        """Tensor names, without the scales that `tensor` applies itself."""
        return frozenset(
            name
            for name in self._table
            if not (
                name.endswith(_SCALE_SUFFIX) and name.removesuffix(_SCALE_SUFFIX) in self._table
            )
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`; reads no data."""
        return self._file(name).entries[name].shape

    def tensor(self, name: str) -> F32:
        """The tensor as float32; FP8 weights are multiplied by their block scales."""
        file = self._file(name)
        values = file.tensor(name)
        if not file.entries[name].dtype.startswith("F8"):
            return values
        return self._scaled(name, values)

    def dtype(self, name: str) -> str:
        """Number format of the tensor `name` on disk."""
        return self._file(name).entries[name].dtype

    def main_dtype(self) -> str:
        """The number format of most weight bytes."""
        return _main_dtype({name: file.entries[name] for name, file in self._table.items()})

    def _scaled(self, name: str, values: F32) -> F32:
        scale_name = name + _SCALE_SUFFIX
        if self._block is None or scale_name not in self._table:
            raise ModelFormatError(
                f"{self._folder}: FP8 tensor {name} needs the tensor {scale_name} and "
                "quantization_config.weight_block_size in config.json"
            )
        scales = self._file(scale_name).tensor(scale_name)
        expected = tuple(
            -(-size // block) for size, block in zip(values.shape, self._block, strict=False)
        )
        if values.ndim != 2 or scales.shape != expected:
            raise ModelFormatError(
                f"{self._folder}: tensor {scale_name} has shape {scales.shape}; {name} of shape "
                f"{values.shape} in blocks of {self._block} needs {expected}"
            )
        return scale_blocks(values, scales, self._block)

    def _file(self, name: str) -> SafetensorsFile:
        file = self._table.get(name)
        if file is None:
            raise ModelFormatError(f"{self._folder}: tensor {name} is missing")
        return file

    @cached_property
    def _table(self) -> dict[str, SafetensorsFile]:
        table: dict[str, SafetensorsFile] = {}
        for shard in self._shards:
            file = SafetensorsFile(shard)
            for name in file.entries:
                if name in table:
                    raise ModelFormatError(
                        f"{shard}: tensor {name} is also in {table[name].path.name}"
                    )
                table[name] = file
        _check_index(self._folder / _INDEX_NAME, table)
        return table


class GGUFCheckpoint:
    """One GGUF file of the llama architecture under Hugging Face names."""

    def __init__(self, path: Path) -> None:
        self.files: tuple[Path, ...] = (path,)
        self._path = path

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config.json synthesised from the metadata."""
        return hf_config(self._file)

    def names(self) -> frozenset[str]:
        """Tensor names in Hugging Face form."""
        return frozenset(self._gguf_names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name`; reads no data."""
        return self._file.entries[self._gguf_name(name)].shape

    def tensor(self, name: str) -> F32:
        """The tensor dequantized to float32, q and k rows in Hugging Face order."""
        return hf_tensor(self._file, self.config, self._gguf_name(name))

    def dtype(self, name: str) -> str:
        """GGML type of the tensor `name`."""
        return self._file.entries[self._gguf_name(name)].dtype

    def main_dtype(self) -> str:
        """The GGML type of most weight bytes."""
        return _main_dtype(self._file.entries)

    def _gguf_name(self, name: str) -> str:
        gguf_name = self._gguf_names.get(name)
        if gguf_name is None:
            raise ModelFormatError(f"{self._path}: tensor {name} is missing")
        return gguf_name

    @cached_property
    def _file(self) -> GGUFFile:
        return GGUFFile(self._path)

    @cached_property
    def _gguf_names(self) -> dict[str, str]:
        return hf_names(self._file)


def read_json(path: Path, *, limit: int) -> dict[str, Any]:
    """The JSON object in `path`, at most `limit` bytes.

    Raises:
        ModelFormatError: unreadable, too long, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as exc:
        raise ModelFormatError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    if len(raw) > limit:
        raise ModelFormatError(f"{path}: longer than the limit of {limit} bytes")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ModelFormatError(f"{path}: not valid JSON ({exc})") from exc
    if not isinstance(value, dict):
        raise ModelFormatError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


def _merge_eos(config: dict[str, Any], generation: dict[str, Any]) -> None:
    """Add the end-of-text ids of generation_config.json: chat models often name theirs only there.

    Values are taken as they are; the spec checks them.
    """
    found: list[Any] = []
    for source in (config, generation):
        value = source.get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    if found:
        config["eos_token_id"] = [v for i, v in enumerate(found) if v not in found[:i]]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a folder: the index's, else model.safetensors, else all."""
    index = folder / _INDEX_NAME
    if index.is_file():
        return tuple(folder / name for name in sorted(set(_weight_map(index).values())))
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    return tuple(sorted(folder.glob("*.safetensors")))[:MAX_SHARDS]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name. File names are untrusted: no path may leave the folder."""
    mapping = read_json(index, limit=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ModelFormatError(f"{index}: weight_map must be a non-empty object")
    for name, file in mapping.items():
        if not isinstance(file, str) or Path(file).name != file or file in (".", ".."):
            raise ModelFormatError(f"{index}: weight_map[{name!r}]={file!r} must be a file name")
    if len(set(mapping.values())) > MAX_SHARDS:
        raise ModelFormatError(f"{index}: more than {MAX_SHARDS} weight files")
    return mapping


def _check_index(index: Path, table: dict[str, SafetensorsFile]) -> None:
    """Every tensor of the index must be in the file that it names."""
    if not index.is_file():
        return
    for name, file in _weight_map(index).items():
        if name not in table or table[name].path.name != file:
            raise ModelFormatError(f"{index}: tensor {name} is not in {file}")


def _fp8_block(config: dict[str, Any], folder: Path) -> tuple[int, int] | None:
    """The FP8 block of the quantization_config, None when the weights are not quantized."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ModelFormatError(
            f"{folder}: quantization method {method!r} is not supported, only 'fp8' with block "
            "scales; use the unquantized checkpoint"
        )
    block = quantization.get("weight_block_size")
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and 1 <= size <= 1 << 16 for size in block)
    ):
        raise ModelFormatError(
            f"{folder}: quantization_config.weight_block_size={block!r} must be two sizes, "
            "for example [128, 128]"
        )
    return block[0], block[1]


def _main_dtype(entries: dict[str, TensorEntry]) -> str:
    by_dtype: dict[str, int] = {}
    for entry in entries.values():
        by_dtype[entry.dtype] = by_dtype.get(entry.dtype, 0) + entry.nbytes
    return max(by_dtype, key=lambda dtype: by_dtype[dtype], default="none")
