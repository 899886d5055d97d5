"""GGUF: number formats, names and row order of llama, and refusal of lying tables."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize, quantize

from tests.unit.models.file_toys import (
    llama_gguf,
    llama_tensors,
    permute_as_gguf,
    quantized_gguf,
)
from xdeepserve.errors import ModelFormatError
from xdeepserve.models.checkpoint import open_checkpoint
from xdeepserve.models.families import parse_spec
from xdeepserve.models.files.gguf_file import GGML_TYPES, GGUFFile
from xdeepserve.models.files.gguf_llama import LLAMA3_ROPE, llama3_divisors, unpermute_rotary

Q = GGMLQuantizationType


def test_type_table_is_the_formats() -> None:
    for type_id, ours in GGML_TYPES.items():
        assert GGML_QUANT_SIZES[Q(type_id)] == (ours.block, ours.nbytes)
        assert Q(type_id).name == ours.name


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0])
def test_number_formats(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    file = GGUFFile(quantized_gguf(tmp_path / "m.gguf", values, kind))
    expected = dequantize(quantize(values, kind), kind)
    assert np.array_equal(file.tensor("t"), expected)
    assert np.abs(file.tensor("t") - values).max() < 0.3


@pytest.mark.parametrize("kind", [Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K])
def test_k_quants(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    """The package cannot encode these, so the bytes are drawn: any byte string is a valid block."""
    nbytes = GGML_QUANT_SIZES[kind][1]
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 0x38, (3, 2 * nbytes)).astype(np.uint8)
    type_id = next(i for i, t in GGML_TYPES.items() if t.name == kind.name)
    path = raw_gguf(
        tmp_path / "m.gguf", tensors=[("t", [512, 3], type_id, 0)], data=blocks.tobytes()
    )
    values = GGUFFile(path).tensor("t")
    assert values.shape == (3, 512)
    assert np.array_equal(values, dequantize(blocks, kind), equal_nan=True)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def raw_gguf(
    path: Path,
    *,
    metadata: bytes = b"",
    num_metadata: int = 0,
    tensors: list[tuple[str, list[int], int, int]] | None = None,
    num_tensors: int | None = None,
    data: bytes = b"",
    head: bytes = b"GGUF\x03\0\0\0",
) -> Path:
    """A GGUF file byte by byte, so that every field can lie."""
    rows = tensors or []
    table = b"".join(
        string(name.encode())
        + struct.pack("<I", len(dims))
        + b"".join(struct.pack("<Q", dim) for dim in dims)
        + struct.pack("<IQ", kind, offset)
        for name, dims, kind, offset in rows
    )
    count = len(rows) if num_tensors is None else num_tensors
    body = head + struct.pack("<QQ", count, num_metadata) + metadata + table
    path.write_bytes(body + bytes(-len(body) % 32) + data)
    return path


def kv(key: bytes, kind: int, value: bytes) -> dict[str, Any]:
    return {"metadata": string(key) + struct.pack("<I", kind) + value, "num_metadata": 1}


LYING: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"head": b"GGML\x03\0\0\0"}, "magic"),
    "version 1": ({"head": b"GGUF\x01\0\0\0"}, "version 1 "),
    "version 99": ({"head": b"GGUF\x63\0\0\0"}, "version 99"),
    "big endian": ({"head": b"GGUF\0\0\0\x03"}, "big-endian"),
    "tensor count 2^63": ({"num_tensors": 1 << 63}, "tensor count"),
    "tensor count beyond file": ({"num_tensors": 1000}, "does not fit"),
    "metadata count 2^63": ({"num_metadata": 1 << 63}, "metadata count"),
    "metadata count beyond file": ({"num_metadata": 1000}, "does not fit"),
    "key length 2^60": (
        {"metadata": struct.pack("<Q", 1 << 60), "num_metadata": 1, "data": bytes(64)}, "limit",
    ),
    "key length beyond file": (
        {"metadata": struct.pack("<Q", 1 << 20), "num_metadata": 1, "data": bytes(64)}, "fit",
    ),
    "key not UTF-8": (kv(b"\xff", 0, b"\0"), "UTF-8"),
    "unknown value type": (kv(b"a.b", 77, bytes(64)), "type 77"),
    "string value too long": (kv(b"a.b", 8, struct.pack("<Q", 1 << 62)), "limit"),
    "array of 2^62": (kv(b"a.b", 9, struct.pack("<IQ", 0, 1 << 62)), "limit"),
    "array beyond file": (kv(b"a.b", 9, struct.pack("<IQ", 10, 1 << 20)), "fit"),
    "array of strings beyond file": (kv(b"a.b", 9, struct.pack("<IQ", 8, 1 << 20)), "fit"),
    "array string too long": (
        kv(b"a.b", 9, struct.pack("<IQQ", 8, 1, 1 << 62) + bytes(64)), "beyond the file end",
    ),
    "array of arrays": (kv(b"a.b", 9, struct.pack("<IQ", 9, 1) + bytes(64)), "type 9"),
    "alignment 0": (kv(b"general.alignment", 4, struct.pack("<I", 0)), "alignment"),
    "alignment 3": (kv(b"general.alignment", 4, struct.pack("<I", 3)), "alignment"),
    "alignment 2^31": (kv(b"general.alignment", 4, struct.pack("<I", 1 << 31)), "alignment"),
    "alignment a string": (kv(b"general.alignment", 8, string(b"32")), "alignment"),
    "no dimensions": ({"tensors": [("t", [], 0, 0)], "data": bytes(64)}, "0 dimensions"),
    "5 dimensions": ({"tensors": [("t", [1] * 5, 0, 0)], "data": bytes(64)}, "5 dimensions"),
    "dimension 0": ({"tensors": [("t", [0], 0, 0)], "data": bytes(64)}, "blocks"),
    "unknown type": ({"tensors": [("t", [8], 99, 0)], "data": bytes(64)}, "type id 99"),
    "partial block": ({"tensors": [("t", [31], 8, 0)], "data": bytes(64)}, "blocks of 32"),
    "offset unaligned": ({"tensors": [("t", [8], 0, 4)], "data": bytes(64)}, "multiple of 32"),
    "offset beyond file": ({"tensors": [("t", [8], 0, 1 << 40)], "data": bytes(64)}, "beyond"),
    "shape beyond file": ({"tensors": [("t", [1 << 40], 0, 0)], "data": bytes(64)}, "beyond"),
    "shape overflows": ({"tensors": [("t", [1 << 62] * 4, 0, 0)], "data": bytes(64)}, "beyond"),
    "name twice": (
        {"tensors": [("t", [8], 0, 0), ("t", [8], 0, 32)], "data": bytes(64)}, "twice",
    ),
    "overlap": (
        {"tensors": [("t", [16], 0, 0), ("u", [8], 0, 32)], "data": bytes(64)}, "overlaps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LYING)
def test_lying_file_is_refused(case: str, tmp_path: Path) -> None:
    arguments, message = LYING[case]
    path = raw_gguf(tmp_path / "m.gguf", **arguments)
    with pytest.raises(ModelFormatError, match=message) as caught:
        GGUFFile(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = quantized_gguf(tmp_path / "m.gguf", np.ones((2, 32), np.float32), Q.Q8_0)
    whole = path.read_bytes()
    data_end = GGUFFile(path).entries["t"].offset + 2 * 34
    for size in range(data_end):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFormatError):
            GGUFFile(path)


def test_metadata_key_twice(tmp_path: Path) -> None:
    one = string(b"a.b") + struct.pack("<IB", 0, 1)
    path = raw_gguf(tmp_path / "m.gguf", metadata=one * 2, num_metadata=2)
    with pytest.raises(ModelFormatError, match="twice"):
        GGUFFile(path)


def test_llama_names_rows_and_config(tmp_path: Path) -> None:
    tensors = llama_tensors()
    checkpoint = open_checkpoint(llama_gguf(tmp_path / "m.gguf"))
    assert checkpoint.names() == set(tensors)
    for name, values in tensors.items():
        assert checkpoint.shape(name) == values.shape
        assert np.array_equal(checkpoint.tensor(name), values), name
    config = checkpoint.config
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert config["eos_token_id"] == 2
    assert config["vocab_size"] == 48
    spec = parse_spec(config)
    assert (spec.family, spec.num_layers, spec.eos_token_ids) == ("llama", 3, (2,))


def test_folder_that_holds_one_gguf(tmp_path: Path) -> None:
    llama_gguf(tmp_path / "m.gguf")
    assert open_checkpoint(tmp_path).main_dtype() == "F32"


def test_unpermute_undoes_the_permutation() -> None:
    weight = np.arange(2 * 8 * 3, dtype=np.float32).reshape(16, 3)
    assert np.array_equal(unpermute_rotary(permute_as_gguf(weight, 2), 2), weight)
    bias = weight[:, 0]
    assert np.array_equal(unpermute_rotary(permute_as_gguf(bias, 2), 2), bias)


def test_untied_head(tmp_path: Path) -> None:
    head = np.full((48, 32), 0.5, np.float32)
    checkpoint = open_checkpoint(llama_gguf(tmp_path / "m.gguf", extra={"output.weight": head}))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert np.array_equal(checkpoint.tensor("lm_head.weight"), head)


def test_llama3_rope_factors(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 32.0, **LLAMA3_ROPE}
    factors = llama3_divisors(500000.0, 8, scaling)
    path = llama_gguf(
        tmp_path / "m.gguf",
        metadata={"rope.freq_base": 500000.0},
        extra={"rope_freqs.weight": factors},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["rope_scaling"] == scaling
    assert "rope_freqs.weight" not in checkpoint.names()
    parse_spec(checkpoint.config)


def test_llama3_divisors_at_the_ends() -> None:
    scaling = {"factor": 8.0, **LLAMA3_ROPE}
    divisors = llama3_divisors(500000.0, 128, scaling)
    assert divisors[0] == 1.0
    assert divisors[-1] == 8.0
    assert np.all(np.diff(divisors) >= 0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "foreign factors": (
        {"extra": {"rope_freqs.weight": np.float32([1, 2, 3, 4])}}, "not Llama 3's scaling",
    ),
    "factors of the wrong size": (
        {"extra": {"rope_freqs.weight": np.float32([1, 2])}}, "asks for 4",
    ),
    "experts": ({"metadata": {"expert_count": 8}}, "experts"),
    "scaling": ({"metadata": {"rope.scaling.type": "yarn"}}, "yarn"),
    "partial rotation": ({"metadata": {"rope.dimension_count": 4}}, "dimension_count"),
    "missing key": ({"metadata": {"embedding_length": None}}, "embedding_length"),
    "negative eps": ({"metadata": {"attention.layer_norm_rms_epsilon": -1.0}}, "epsilon"),
    "nan theta": ({"metadata": {"rope.freq_base": float("nan")}}, "freq_base"),
    "zero heads": ({"metadata": {"attention.head_count": 0}}, "head_count"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unreadable_llama_is_refused(case: str, tmp_path: Path) -> None:
    arguments, message = REFUSED[case]
    with pytest.raises(ModelFormatError, match=message):
        parse_spec(open_checkpoint(llama_gguf(tmp_path / "m.gguf", **arguments)).config)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = raw_gguf(tmp_path / "m.gguf", **kv(b"general.architecture", 8, string(b"mamba")))
    with pytest.raises(ModelFormatError, match="'mamba' is not supported"):
        _ = open_checkpoint(path).config
