"""Memory that is advised to be in huge pages: contents, limits, and what the kernel was told."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from xdeepserve.models import huge_pages
from xdeepserve.models.huge_pages import HUGE_PAGE_BYTES, huge_zeros, map_file

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping that holds the address."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            begin, stop = (int(bound, 16) for bound in bounds.groups())
            is_inside = begin <= address < stop
        elif is_inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("rows", [1, HUGE_PAGE_BYTES // 8 + 3])
def test_zeros(rows: int) -> None:
    array = huge_zeros((rows, 4), np.dtype(np.uint16))
    assert array.shape == (rows, 4)
    assert array.dtype == np.uint16
    assert not array.any()
    array[-1] = 7
    assert array.sum() == 28


def test_more_than_there_is() -> None:
    with pytest.raises(MemoryError):
        huge_zeros((1 << 62,), np.dtype(np.uint8))


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)))
    mapped = map_file(path)
    assert mapped.tobytes() == bytes(range(256))
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
    path.unlink()
    assert mapped[255] == 255


@on_linux
def test_the_kernel_is_told(tmp_path: Path) -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        pytest.skip("this kernel has no huge pages")
    assert "hg" in flags_of(huge_zeros((HUGE_PAGE_BYTES,), np.dtype(np.uint8)).ctypes.data)
    path = tmp_path / "file"
    path.write_bytes(bytes(HUGE_PAGE_BYTES))
    assert "hg" in flags_of(map_file(path).ctypes.data)


def test_a_kernel_that_refuses_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    for advice in (None, 0xBAD):
        monkeypatch.setattr(huge_pages, "_MADV_HUGEPAGE", advice)
        assert not huge_zeros((HUGE_PAGE_BYTES,), np.dtype(np.uint8)).any()
