"""Safetensors: what is read, and that damaged or lying files end in one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from tests.unit.models.file_toys import LLAMA_CONFIG, llama_folder, llama_tensors, raw_safetensors
from xdeepserve.errors import ConfigError, ModelFormatError
from xdeepserve.models.checkpoint import open_checkpoint
from xdeepserve.models.files.checkpoint_writer import write_hf_folder
from xdeepserve.models.files.number_formats import from_float32, to_float32
from xdeepserve.models.files.safetensors_file import (
    MAX_HEADER_BYTES,
    SafetensorsFile,
    TensorPlan,
    write_safetensors,
)


def row(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = row("F32", [2], 0, 8)

LYING = {
    "header longer than file": ({"a": ONE}, bytes(8), 10_000, "truncated"),
    "header length 2^63": ({"a": ONE}, bytes(8), 1 << 63, "limit"),
    "header length over cap": ({"a": ONE}, bytes(8), MAX_HEADER_BYTES + 1, "limit"),
    "header not JSON": (b"{nope", bytes(8), None, "not valid JSON"),
    "header cut short": (b'{"a":{"dtype":"F3', bytes(8), None, "not valid JSON"),
    "header not UTF-8": (b'{"\xff":1}', bytes(8), None, "not valid JSON"),
    "header a list": ([], b"", None, "JSON object"),
    "header too deep": (b"[" * 100_000 + b"]" * 100_000, b"", None, "not valid JSON"),
    "huge integer": (b'{"a":' + b"9" * 5000 + b"}", b"", None, "not valid JSON"),
    "name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(ONE).encode(),) * 2), bytes(8), None, "twice"),
    "row a number": ({"a": 3}, bytes(8), None, "object"),
    "unknown dtype": ({"a": row("F4", [2], 0, 8)}, bytes(8), None, "dtype 'F4'"),
    "dtype a number": ({"a": row(4, [2], 0, 8)}, bytes(8), None, "dtype 4"),  # type: ignore[arg-type]
    "negative dimension": ({"a": row("F32", [-2], 0, 8)}, bytes(8), None, "shape"),
    "float dimension": ({"a": row("F32", [2.0], 0, 8)}, bytes(8), None, "shape"),
    "bool dimension": ({"a": row("F32", [True, 2], 0, 8)}, bytes(8), None, "shape"),
    "shape a string": ({"a": row("F32", "2", 0, 8)}, bytes(8), None, "shape"),
    "too many dimensions": ({"a": row("F32", [1] * 9 + [2], 0, 8)}, bytes(8), None, "shape"),
    "shape too big": ({"a": row("F32", [3], 0, 8)}, bytes(8), None, "12 bytes"),
    "shape overflows": ({"a": row("F32", [1 << 62, 4], 0, 8)}, bytes(8), None, "do not hold"),
    "offsets reversed": ({"a": row("F32", [2], 8, 0)}, bytes(8), None, "data_offsets"),
    "offsets negative": ({"a": row("F32", [2], -8, 0)}, bytes(8), None, "data_offsets"),
    "offsets missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None, "data_offsets"),
    "beyond the file": ({"a": ONE}, bytes(7), None, "truncated"),
    "far beyond": ({"a": row("U8", [1 << 40], 0, 1 << 40)}, bytes(8), None, "truncated"),
    "overlap": ({"a": ONE, "b": row("F32", [2], 4, 12)}, bytes(12), None, "overlaps"),
    "hole": ({"a": ONE, "b": row("F32", [2], 12, 20)}, bytes(20), None, "hole"),
    "bytes left over": ({"a": ONE}, bytes(9), None, "describes"),
}


@pytest.mark.parametrize("case", LYING)
def test_lying_header_is_refused(case: str, tmp_path: Path) -> None:
    header, data, length, message = LYING[case]
    path = raw_safetensors(tmp_path / "m.safetensors", header, data, length=length)
    with pytest.raises(ModelFormatError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("size", [0, 1, 7])
def test_tiny_file_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(ModelFormatError, match="too few"):
        SafetensorsFile(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, [TensorPlan("a", (3, 5), lambda: np.ones((3, 5), np.float32), "F32")])
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFormatError):
            SafetensorsFile(path)


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    single = rng.standard_normal((3, 5)).astype(np.float32)
    half = single.astype(np.float16)
    save_file({"single": single, "half": half, "empty": single[:0]}, tmp_path / "m.safetensors")
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert np.array_equal(file.tensor("single"), single)
    assert np.array_equal(file.tensor("half"), half.astype(np.float32))
    assert file.tensor("empty").shape == (0, 5)


def test_library_reads_what_we_write(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3) / 8
    plans = [TensorPlan(d, (2, 3), lambda: values, d) for d in ("F32", "F16", "BF16")]
    done: list[int] = []
    write_safetensors(tmp_path / "m.safetensors", plans, done.append)
    read = dict(safetensors.deserialize((tmp_path / "m.safetensors").read_bytes()))
    assert {name: (t["dtype"], t["shape"]) for name, t in read.items()} == {
        "F32": ("F32", [2, 3]), "F16": ("F16", [2, 3]), "BF16": ("BF16", [2, 3]),
    }  # fmt: skip
    assert bytes(read["F32"]["data"]) == values.tobytes()
    assert bytes(read["BF16"]["data"]) == (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    assert done == [24, 36, 48]


def test_bf16_rounds_to_nearest_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F800000, 0xFF800000], np.uint32)
    stored = from_float32(bits.view(np.float32), "BF16").view("<u2")
    assert stored.tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80]
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(to_float32(from_float32(nan, "BF16"), "BF16")).all()


def fp8_by_the_definition(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of an FP8 code, from its bits as text."""
    text = f"{code:08b}"
    exponent = int(text[1 : 1 + exponent_bits], 2)
    mantissa = int(text[1 + exponent_bits :], 2) / 2**mantissa_bits
    bias = 2 ** (exponent_bits - 1) - 1
    size = mantissa * 2 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2 ** (exponent - bias)
    return -size if text[0] == "1" else size


def test_fp8_tables() -> None:
    codes = np.arange(256, dtype=np.uint8)
    e4m3, e5m2 = to_float32(codes, "F8_E4M3"), to_float32(codes, "F8_E5M2")
    for code in range(256):
        if code & 0x7F == 0x7F:
            assert np.isnan(e4m3[code])
        else:
            assert e4m3[code] == fp8_by_the_definition(code, 4, 3)
        if code & 0x7C == 0x7C:
            assert not np.isfinite(e5m2[code])
        else:
            assert e5m2[code] == fp8_by_the_definition(code, 5, 2)
    assert e4m3[0x7E] == 448.0
    assert e5m2[0x7B] == 57344.0
    assert e5m2[0xFC] == -np.inf


def fp8_folder(path: Path, *, block: Any = (2, 3), scale_shape: tuple[int, int] = (3, 3)) -> Path:
    """A folder with one FP8 weight [5, 7] and its block scales."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 0x7F, (5, 7)).astype(np.uint8)
    scales = rng.standard_normal(scale_shape).astype(np.float32)
    cut = codes.size
    header = {
        "w": row("F8_E4M3", [5, 7], 0, cut),
        "w_scale_inv": row("F32", list(scale_shape), cut, cut + scales.nbytes),
    }
    path.mkdir()
    raw_safetensors(path / "model.safetensors", header, codes.tobytes() + scales.tobytes())
    quantization = {"quant_method": "fp8", "weight_block_size": list(block)}
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return path


def test_fp8_block_scales(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(fp8_folder(tmp_path / "m"))
    raw = SafetensorsFile(tmp_path / "m" / "model.safetensors")
    scales, codes = raw.tensor("w_scale_inv"), raw.tensor("w")
    expected = np.empty((5, 7), np.float32)
    for i in range(5):
        for j in range(7):
            expected[i, j] = codes[i, j] * scales[i // 2, j // 3]
    assert checkpoint.names() == {"w"}
    assert np.array_equal(checkpoint.tensor("w"), expected)


def test_fp8_scales_of_the_wrong_shape(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(fp8_folder(tmp_path / "m", scale_shape=(3, 2)))
    with pytest.raises(ModelFormatError, match=r"w_scale_inv has shape \(3, 2\)"):
        checkpoint.tensor("w")


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq"},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": [128.5, 128]},
        [],
    ],
)
def test_unsupported_quantization_is_refused(quantization: Any, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m", {**LLAMA_CONFIG, "quantization_config": quantization})
    with pytest.raises(ModelFormatError, match=r"quantization|weight_block_size"):
        open_checkpoint(folder)


def test_fp8_without_quantization_config(tmp_path: Path) -> None:
    folder = fp8_folder(tmp_path / "m")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelFormatError, match="w_scale_inv"):
        open_checkpoint(folder).tensor("w")


def shard(path: Path, names: dict[str, str], index: Any = None) -> Path:
    """A folder whose tensors lie in several files: tensor name -> file name."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    for file in set(names.values()):
        mine = [name for name in names if names[name] == file]
        plans = [TensorPlan(n, (1,), lambda n=n: np.float32([len(n)])) for n in mine]
        write_safetensors(path / file, plans)
    if index is not None:
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


SHARDS = {"a": "model-1.safetensors", "bb": "model-2.safetensors", "ccc": "model-1.safetensors"}


@pytest.mark.parametrize("index", [None, {"weight_map": SHARDS}])
def test_sharded_folder(index: Any, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(shard(tmp_path / "m", SHARDS, index))
    assert checkpoint.names() == set(SHARDS)
    assert [checkpoint.tensor(name)[0] for name in sorted(SHARDS)] == [1, 2, 3]
    assert len(checkpoint.files) == (3 if index is None else 4)


BAD_INDEX = {
    "tensor not in its file": ({"a": "model-2.safetensors"}, "is not in"),
    "tensor nowhere": ({"zzz": "model-1.safetensors"}, "is not in"),
    "file missing": ({"a": "model-9.safetensors"}, "cannot be read"),
    "path leaves the folder": ({"a": "../model-1.safetensors"}, "file name"),
    "absolute path": ({"a": "/etc/passwd"}, "file name"),
    "file a number": ({"a": 1}, "file name"),
    "empty map": ({}, "non-empty"),
    "map a list": ([], "non-empty"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_index_is_refused(case: str, tmp_path: Path) -> None:
    weight_map, message = BAD_INDEX[case]
    folder = shard(tmp_path / "m", SHARDS, {"weight_map": weight_map})
    with pytest.raises(ModelFormatError, match=message):
        open_checkpoint(folder).names()


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = shard(tmp_path / "m", SHARDS)
    write_safetensors(folder / "z.safetensors", [TensorPlan("a", (1,), lambda: np.zeros(1))])
    with pytest.raises(ModelFormatError, match=r"tensor a is also in model-1"):
        open_checkpoint(folder).names()


@pytest.mark.parametrize("config", [b"", b"{", b"[1]", b"\xff", b"[" * 200_000, b'"text"'])
def test_damaged_config_is_refused(config: bytes, tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "m")
    (folder / "config.json").write_bytes(config)
    with pytest.raises(ModelFormatError, match=r"config\.json"):
        open_checkpoint(folder)


def test_places_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "file.bin").write_bytes(b"x")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "a.gguf").write_bytes(b"x")
    (tmp_path / "two" / "b.gguf").write_bytes(b"x")
    expected = {
        "absent": "does not exist",
        "empty": "not a model",
        "pickled": "convert them to safetensors",
        "file.bin": "not a .gguf file",
        "two": "2 GGUF files",
    }
    for name, message in expected.items():
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(tmp_path / name)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    path = raw_safetensors(tmp_path / "m.safetensors", {"a": row("I32", [2], 0, 8)}, bytes(8))
    with pytest.raises(ModelFormatError, match="dtype I32"):
        SafetensorsFile(path).tensor("a")


def test_written_folder_reads_back(tmp_path: Path) -> None:
    tensors = llama_tensors()
    checkpoint = open_checkpoint(llama_folder(tmp_path / "deep" / "m"))
    assert checkpoint.config == LLAMA_CONFIG
    assert checkpoint.names() == set(tensors)
    assert checkpoint.main_dtype() == "BF16"
    for name, values in tensors.items():
        assert checkpoint.shape(name) == values.shape
        assert np.array_equal(checkpoint.tensor(name), values)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> Any:
        raise ModelFormatError("no such values")

    with pytest.raises(ModelFormatError, match="no such values"):
        write_hf_folder(tmp_path / "m", config={}, tensors=[TensorPlan("a", (1,), fail)], files={})
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    llama_folder(tmp_path / "m")
    with pytest.raises(ConfigError, match="exists already"):
        llama_folder(tmp_path / "m")


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": [7, 2]}, [2, 7]),
        ({"eos_token_id": 9}, [2, 9]),
        ({"eos_token_id": None}, [2]),
        ({}, [2]),
    ],
)
def test_eos_ids_of_generation_config_are_joined(
    generation: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    folder = llama_folder(tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps(generation))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config["eos_token_id"] == expected
    assert folder / "generation_config.json" in checkpoint.files
