"""The packed file: what goes in comes out, and no damaged file is served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xdeepserve.errors import DeadlineExceeded, ModelFormatError
from xdeepserve.models.files.file_lock import file_lock
from xdeepserve.models.files.packed_file import (
    ALIGNMENT,
    PackedFile,
    PackedFileWriter,
    PackedKey,
)
from xdeepserve.models.files.source_digest import check_unchanged, source_digest, stamp_files
from xdeepserve.ops import PackedWeight, WeightDtype

KEY = PackedKey(digest="d" * 64, dtype="bf16", layout="rows/1", recipe="r")


def weight(start: int, nbytes: int = 40) -> PackedWeight:
    data = (np.arange(nbytes) + start).astype(np.uint8)
    return PackedWeight("rows/1", WeightDtype.BF16, (1, 4, 5), data)


def packed(path: Path) -> Path:
    writer = PackedFileWriter(path, KEY, {"model_type": "toy"})
    writer.add_linear("w", [weight(0), weight(40), weight(80)])
    writer.add_array("norm", np.arange(7, dtype=np.float32))
    writer.add_array("table", np.arange(6, dtype=np.uint16).reshape(2, 3))
    writer.finish()
    return path


def test_round_trip(tmp_path: Path) -> None:
    file = PackedFile(packed(tmp_path / "p"), KEY)
    linear = file.linear("w")
    assert linear is not None
    assert (linear.layout, linear.dtype, linear.shape) == ("rows/1", WeightDtype.BF16, (3, 4, 5))
    assert np.array_equal(linear.data, np.arange(120).astype(np.uint8))
    assert linear.data.ctypes.data % ALIGNMENT == 0
    assert np.array_equal(linear.groups(1, 2).data, weight(40).data)
    norm, table = file.array("norm"), file.array("table")
    assert norm is not None
    assert table is not None
    assert norm.dtype == np.float32
    assert np.array_equal(norm, np.arange(7))
    assert np.array_equal(table, [[0, 1, 2], [3, 4, 5]])
    assert file.config == {"model_type": "toy"}
    assert file.linear("norm") is None
    assert file.array("w") is None


def test_maps_are_read_only(tmp_path: Path) -> None:
    norm = PackedFile(packed(tmp_path / "p"), KEY).array("norm")
    assert norm is not None
    with pytest.raises(ValueError, match="read-only"):
        norm[0] = 1.0


def test_every_flipped_byte_that_matters_is_found(tmp_path: Path) -> None:
    path = packed(tmp_path / "p")
    whole = bytearray(path.read_bytes())
    data = [ALIGNMENT + i for i in (0, 60, 119)]
    header = range(4 * ALIGNMENT, len(whole), 37)
    for position in [*range(36), *data, 2 * ALIGNMENT, 3 * ALIGNMENT + 11, *header]:
        damaged = whole.copy()
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ModelFormatError, match="damaged"):
            PackedFile(path, KEY)
    path.write_bytes(whole)
    PackedFile(path, KEY)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = packed(tmp_path / "p")
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 499), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelFormatError, match="damaged"):
            PackedFile(path, KEY)
    path.write_bytes(whole + b"x")
    with pytest.raises(ModelFormatError, match="damaged"):
        PackedFile(path, KEY)


def test_unfinished_file_is_not_a_packed_file(tmp_path: Path) -> None:
    writer = PackedFileWriter(tmp_path / "p", KEY, {})
    writer.add_array("norm", np.zeros(5000, np.float32))
    writer.close()
    with pytest.raises(ModelFormatError, match="damaged"):
        PackedFile(tmp_path / "p", KEY)


def test_file_of_another_key_is_refused(tmp_path: Path) -> None:
    path = packed(tmp_path / "p")
    other = PackedKey(digest="e" * 64, dtype="bf16", layout="rows/1", recipe="r")
    with pytest.raises(ModelFormatError, match="made from"):
        PackedFile(path, other)


def test_keys_give_distinct_file_names() -> None:
    keys = [
        PackedKey(digest=digest, dtype=dtype, layout=layout, recipe=recipe)
        for digest in ("a" * 64, "b" * 64)
        for dtype in ("bf16", "int8")
        for layout in ("rows/1", "rows/2")
        for recipe in ("r", "s")
    ]
    assert len({key.file_name for key in keys}) == len(keys)
    assert all("/" not in key.file_name for key in keys)


def test_digest_is_memoised_by_stat(tmp_path: Path) -> None:
    file = tmp_path / "w"
    file.write_bytes(b"abc")
    stages: list[str] = []

    def digest() -> str:
        return source_digest(
            [file], memo_dir=tmp_path, progress=lambda stage, done, total: stages.append(stage)
        )

    first = digest()
    assert digest() == first
    assert stages == ["hash"]
    file.write_bytes(b"abcd")
    assert digest() != first
    assert stages == ["hash", "hash"]


@pytest.mark.parametrize("memo", [b"", b"{", b"[]", b'{"files": 1, "digest": 2}', b"\xff"])
def test_damaged_memo_costs_one_hash(memo: bytes, tmp_path: Path) -> None:
    file = tmp_path / "w"
    file.write_bytes(b"abc")
    first = source_digest([file], memo_dir=tmp_path)
    (path,) = tmp_path.glob("*.digest.json")
    path.write_bytes(memo)
    assert source_digest([file], memo_dir=tmp_path) == first


def test_digest_depends_on_names_and_contents(tmp_path: Path) -> None:
    for name, content in {"a": b"1", "b": b"2", "c": b"1"}.items():
        (tmp_path / name).write_bytes(content)

    def digest(*names: str) -> str:
        return source_digest([tmp_path / name for name in names], memo_dir=tmp_path)

    assert len({digest("a"), digest("b"), digest("c"), digest("a", "b"), digest("b", "a")}) == 5


def test_change_while_reading_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w"
    file.write_bytes(b"abc")
    stamps = stamp_files([file])
    check_unchanged([file], stamps)
    file.write_bytes(b"abcd")
    with pytest.raises(ModelFormatError, match="changed"):
        check_unchanged([file], stamps)


def test_missing_source_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="cannot be read"):
        source_digest([tmp_path / "absent"], memo_dir=tmp_path)


def test_lock_is_exclusive_and_waits_have_a_deadline(tmp_path: Path) -> None:
    with (
        file_lock(tmp_path / "lock", timeout_s=1.0),
        pytest.raises(DeadlineExceeded, match="held by another process"),
        file_lock(tmp_path / "lock", timeout_s=0.0),
    ):
        pass
    with file_lock(tmp_path / "lock", timeout_s=0.0):
        pass
