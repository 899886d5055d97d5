"""load_model: packing once, mapping afterwards, and refusal of models that do not fit."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.unit.models.file_toys import LLAMA_CONFIG, llama_folder, llama_gguf, llama_tensors
from xdeepserve.errors import ConfigError, ModelFormatError
from xdeepserve.models.decoder import Model
from xdeepserve.models.loader import load_model
from xdeepserve.ops import WeightDtype
from xdeepserve.ops.reference import ReferenceOps

W8A8G64 = WeightDtype.W8A8G64


def load(path: Path, cache: Path, stages: list[str] | None = None) -> Model:
    def progress(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if stages is not None:
            stages.append(stage)

    return load_model(
        path, dtype=WeightDtype.FLOAT32, ops=ReferenceOps(), cache_dir=cache, progress=progress
    )


def fingerprint(model: Model) -> bytes:
    """Bytes of weights of several kinds."""
    last = model.layers[-1]
    assert last.ffn is not None
    parts = [model.embedding.table, model.head.lm_head.data, last.ffn.down.data]
    return b"".join(part.tobytes() for part in [*parts, last.attention.layer.frame.ffn_norm])


def only_pack(cache: Path) -> Path:
    (path,) = cache.glob("*.pack")
    return path


def test_packs_once_then_maps(tmp_path: Path) -> None:
    folder, cache, stages = llama_folder(tmp_path / "m"), tmp_path / "c", list[str]()
    cold = load(folder, cache, stages)
    assert {"hash", "pack"} == set(stages)
    stages.clear()
    warm = load(folder, cache, stages)
    assert stages == []
    assert fingerprint(warm) == fingerprint(cold)
    assert np.array_equal(warm.embedding.table, llama_tensors()["model.embed_tokens.weight"])
    assert not list(cache.glob("*.tmp"))


def test_warm_load_does_not_read_the_weights(tmp_path: Path) -> None:
    folder, cache = llama_folder(tmp_path / "m"), tmp_path / "c"
    cold = load(folder, cache)
    weights = folder / "model.safetensors"
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.write(b"\xff" * stat.st_size)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint(load(folder, cache)) == fingerprint(cold)


def test_changed_weights_are_packed_again(tmp_path: Path) -> None:
    cache = tmp_path / "c"
    first = load(llama_folder(tmp_path / "a"), cache)
    other = llama_folder(tmp_path / "b", tensors=llama_tensors(seed=1))
    os.replace(other / "model.safetensors", tmp_path / "a" / "model.safetensors")
    assert fingerprint(load(tmp_path / "a", cache)) != fingerprint(first)
    assert len(list(cache.glob("*.pack"))) == 2


def test_equal_content_elsewhere_shares_the_file(tmp_path: Path) -> None:
    cache, stages = tmp_path / "c", list[str]()
    load(llama_folder(tmp_path / "a"), cache)
    load(llama_folder(tmp_path / "b"), cache, stages)
    assert "pack" not in stages
    only_pack(cache)


def test_dtypes_have_files_of_their_own(tmp_path: Path) -> None:
    folder, cache = llama_folder(tmp_path / "m"), tmp_path / "c"
    for dtype in WeightDtype:
        model = load_model(folder, dtype=dtype, ops=ReferenceOps(), cache_dir=cache)
        ffn = model.layers[1].ffn
        assert ffn is not None
        assert ffn.down.dtype is (W8A8G64 if dtype is WeightDtype.INT8 else dtype)
    assert len(list(cache.glob("*.pack"))) == len(WeightDtype)


def test_formats_with_the_same_bytes_share_a_file(tmp_path: Path) -> None:
    folder, cache = llama_folder(tmp_path / "m"), tmp_path / "c"
    ops = ReferenceOps()
    for outliers in (W8A8G64, WeightDtype.W8A16):
        ops.outlier_dtype = outliers
        model = load_model(folder, dtype=WeightDtype.INT8, ops=ops, cache_dir=cache)
        assert model.head.lm_head.dtype is outliers
    only_pack(cache)


@pytest.mark.parametrize("position", [0, 2 * 4096, -1])
def test_damaged_cache_file_is_rebuilt(
    position: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, cache = llama_folder(tmp_path / "m"), tmp_path / "c"
    cold = fingerprint(load(folder, cache))
    path = only_pack(cache)
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert fingerprint(load(folder, cache)) == cold
    assert "damaged" in caplog.text
    caplog.clear()
    load(folder, cache)
    assert caplog.text == ""


def test_data_that_others_have_checked_are_taken_as_they_are(tmp_path: Path) -> None:
    folder, cache = llama_folder(tmp_path / "m"), tmp_path / "c"
    load(folder, cache)
    path = only_pack(cache)
    content = bytearray(path.read_bytes())
    content[2 * 4096] ^= 1
    path.write_bytes(content)
    load_model(folder, dtype=WeightDtype.FLOAT32, ops=ReferenceOps(), cache_dir=cache, verify=False)
    assert path.read_bytes() == content


def test_empty_cache_file_is_rebuilt(tmp_path: Path) -> None:
    folder, cache = llama_folder(tmp_path / "m"), tmp_path / "c"
    cold = fingerprint(load(folder, cache))
    only_pack(cache).write_bytes(b"")
    assert fingerprint(load(folder, cache)) == cold


def test_old_temporaries_are_removed(tmp_path: Path) -> None:
    cache = tmp_path / "c"
    cache.mkdir()
    for name in ("old.pack.tmp", "young.pack.tmp"):
        (cache / name).write_bytes(b"x")
    os.utime(cache / "old.pack.tmp", (1e9, 1e9))
    load(llama_folder(tmp_path / "m"), cache)
    assert [path.name for path in cache.glob("*.tmp")] == ["young.pack.tmp"]


def test_files_of_older_code_are_replaced(tmp_path: Path) -> None:
    folder, cache = llama_folder(tmp_path / "m"), tmp_path / "c"
    load(folder, cache)
    path = only_pack(cache)
    older = path.rename(path.with_name(path.name.replace(path.stem[-8:], "00000000")))
    other_dtype = cache / older.name.replace("float32", "bf16")
    other_dtype.write_bytes(b"")
    load(folder, cache)
    assert sorted(cache.glob("*.pack")) == sorted([path, other_dtype])


CHILD = """
import sys
from pathlib import Path
from xdeepserve.models.loader import load_model
from xdeepserve.ops import WeightDtype
from xdeepserve.ops.reference import ReferenceOps
stages = set()
print("ready", flush=True)
sys.stdin.readline()
load_model(Path(sys.argv[1]), dtype=WeightDtype.FLOAT32, ops=ReferenceOps(),
           cache_dir=Path(sys.argv[2]), progress=lambda stage, done, total: stages.add(stage))
print("packed" if "pack" in stages else "mapped", flush=True)
"""


def test_two_processes_pack_once(tmp_path: Path) -> None:
    folder, cache = llama_folder(tmp_path / "m"), tmp_path / "c"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(folder), str(cache)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = sorted(child.communicate(timeout=60)[0].strip() for child in children)
    assert outputs == ["mapped", "packed"]
    only_pack(cache)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    folder = llama_folder(tmp_path / "m", tensors=tensors)
    with pytest.raises(ModelFormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*.pack"))
    assert not list((tmp_path / "c").glob("*.tmp"))


def test_wrong_shape_names_both_shapes(tmp_path: Path) -> None:
    folder = llama_folder(
        tmp_path / "m", {**LLAMA_CONFIG, "intermediate_size": 62}, llama_tensors()
    )
    with pytest.raises(ModelFormatError, match=r"\[64, 32\].*\[62, 32\]"):
        load(folder, tmp_path / "c")


def test_unknown_tensors_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {**llama_tensors(), "model.layers.7.extra.weight": np.zeros(3, np.float32)}
    with caplog.at_level(logging.WARNING):
        load(llama_folder(tmp_path / "m", tensors=tensors), tmp_path / "c")
    assert "1 tensors" in caplog.text
    assert "model.layers.7.extra.weight" in caplog.text


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["model.norm.weight"][3] = np.nan
    with pytest.raises(ModelFormatError, match=r"model\.norm\.weight holds values"):
        load(llama_folder(tmp_path / "m", tensors=tensors), tmp_path / "c")


def test_gguf_loads_like_the_folder(tmp_path: Path) -> None:
    cache = tmp_path / "c"
    dense = load(llama_folder(tmp_path / "m"), cache)
    assert fingerprint(load(llama_gguf(tmp_path / "m.gguf"), cache)) == fingerprint(dense)


def test_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="XDEEPSERVE_HOME"):
        load(llama_folder(tmp_path / "m"), tmp_path / "file" / "c")
