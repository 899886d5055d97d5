"""Blobs and files that lie: every field is checked before anything is mapped."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.xccl.ports import SMALL
from xdeepserve import _xccl
from xdeepserve.errors import SegmentError
from xdeepserve.xccl import Layout, Port

# Offsets of fields of SegmentHeader (native/xccl/layout.h).
MAGIC, VERSION, HEADER_BYTES, TOTAL_BYTES, RANK, PID = 0, 8, 12, 16, 24, 28
PID_START, INCARNATION, PARAMS, RUN_ID, NAME = 32, 40, 48, 88, 136


@pytest.fixture
def port(run_id: str) -> Iterator[Port]:
    with Port(run_id, "r0", 0, layout=SMALL) as made:
        yield made


@pytest.fixture
def other(run_id: str) -> Iterator[Port]:
    with Port(run_id, "r1", 1, layout=SMALL) as made:
        yield made


def changed(blob: bytes, offset: int, format_: str, value: object) -> bytes:
    data = bytearray(blob)
    struct.pack_into(format_, data, offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    ("offset", "format_", "value", "message"),
    [
        (MAGIC, "8s", b"NOTXCCL!", "magic"),
        (VERSION, "<I", 2, "version"),
        (HEADER_BYTES, "<I", 10, "header_bytes"),
        (TOTAL_BYTES, "<Q", 4096, "total_bytes"),
        (TOTAL_BYTES, "<Q", 2**64 - 1, "total_bytes"),
        (RANK, "<I", 4, "rank"),
        (RANK, "<I", 2**32 - 1, "rank"),
        (PID, "<i", 0, "pid"),
        (PID, "<i", -5, "pid"),
        (INCARNATION, "<Q", 0, "incarnation"),
        (INCARNATION, "<Q", 12345, "another incarnation"),
        (PID_START, "<Q", 1, "contradicts"),
        (PARAMS, "<I", 0, "max_ranks"),
        (PARAMS, "<I", 257, "max_ranks"),
        (PARAMS + 4, "<I", 3, "power of two"),
        (PARAMS + 8, "<I", 100, "multiple of 64"),
        (PARAMS + 12, "<I", 0, "row_slots"),
        (PARAMS + 16, "<Q", 2**63, "request_bytes"),
        (PARAMS + 24, "<Q", 2**64 - 64, "reply_bytes"),
        (PARAMS + 32, "<Q", 2**40, "window_bytes"),
        (RUN_ID, "48s", b"x" * 48, "no end"),
        (RUN_ID, "48s", b"../../etc", "run_id"),
        (NAME, "48s", b"a/b", "name"),
        (NAME, "48s", b"", "name"),
        (NAME, "48s", b"nobody", "cannot open"),
    ],
)
def test_a_lying_blob_is_refused(
    port: Port, other: Port, offset: int, format_: str, value: object, message: str
) -> None:
    # As if from another process, so that the file is looked at and not this process's registry.
    foreign = changed(other.blob(), PID, "<i", os.getppid()) if offset != PID else other.blob()
    with pytest.raises(SegmentError, match=message):
        port.attach(changed(foreign, offset, format_, value))
    assert not port.is_linked(1)


@pytest.mark.parametrize("size", [0, 1, 255, 257, 1024])
def test_a_blob_has_one_size(port: Port, size: int) -> None:
    with pytest.raises(SegmentError, match="256 bytes"):
        port.attach(bytes(size))


def test_the_blob_survives_the_exchange(port: Port, other: Port) -> None:
    assert len(other.blob()) == _xccl.BLOB_BYTES
    described = _xccl.describe_blob(other.blob())
    assert described == (other.run_id, "r1", 1, os.getpid(), other.incarnation, SMALL.segment_bytes)
    port.attach(other.blob())
    other.attach(port.blob())
    assert port.is_linked(1)


def test_ranks_of_another_run_or_layout_are_refused(port: Port, run_id: str) -> None:
    stranger_run = f"{run_id}.other"
    with (
        Port(stranger_run, "r1", 1, layout=SMALL) as stranger,
        pytest.raises(SegmentError, match="run"),
    ):
        port.attach(stranger.blob())
    layout = Layout(max_ranks=4, p2p_slots=8)
    with (
        Port(run_id, "r1", 1, layout=layout) as other,
        pytest.raises(SegmentError, match="another layout"),
    ):
        port.attach(other.blob())


def test_an_older_life_is_refused_and_the_same_again_is_nothing(run_id: str, port: Port) -> None:
    old = Port(run_id, "r1", 1, layout=SMALL)
    with Port(run_id, "r1", 1, layout=SMALL) as new:
        port.attach(new.blob())
        port.attach(new.blob())
        with pytest.raises(SegmentError, match="older"):
            port.attach(old.blob())
        old.close()  # takes nothing from its successor
        assert port.status_of(1).incarnation == new.incarnation
        assert _xccl.read_blob(run_id, "r1") == new.blob()


def test_two_ranks_cannot_have_one_number(run_id: str, port: Port) -> None:
    with (
        Port(run_id, "twin", 0, layout=SMALL) as twin,
        pytest.raises(SegmentError, match="is this rank"),
    ):
        port.attach(twin.blob())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(max_ranks=0), "max_ranks"),
        (Layout(p2p_slots=3), "power of two"),
        (Layout(p2p_slot_bytes=32), "p2p_slot_bytes"),
        (Layout(request_bytes=100), "multiple of 64"),
        (Layout(max_ranks=256, row_slots=64, request_bytes=1 << 32), "size"),
        (Layout(reply_bytes=-64), "negative"),
        (Layout(max_ranks=1 << 32), "too large"),
        (Layout(window_bytes=1 << 36), "does not fit"),
    ],
)
def test_impossible_layouts(run_id: str, layout: Layout, message: str) -> None:
    with pytest.raises(SegmentError, match=message):
        Port(run_id, "r0", 0, layout=layout)


@pytest.mark.parametrize("name", ["", "a/b", "a b", "x" * 48, "..\n", "ä"])
def test_names_are_plain(run_id: str, name: str) -> None:
    with pytest.raises(SegmentError, match="name"):
        Port(run_id, name, 0, layout=SMALL)
    with pytest.raises(SegmentError, match="run_id"):
        Port("a-b", "r0", 0, layout=SMALL)


def test_files_of_others_are_refused(run_id: str, port: Port, other: Port) -> None:
    path = Path(f"/dev/shm/xds-{run_id}-r1")
    foreign = changed(other.blob(), PID, "<i", os.getppid())
    path.chmod(0o644)
    with pytest.raises(SegmentError, match="mode 0600"):
        port.attach(foreign)
    path.chmod(0o600)
    os.truncate(path, 4096)
    with pytest.raises(SegmentError, match="4096 bytes"):
        port.attach(foreign)
    path.unlink()
    path.symlink_to("/etc/hostname")
    with pytest.raises(SegmentError, match="cannot open"):
        port.attach(foreign)
    path.unlink()
