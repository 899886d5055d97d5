"""Listing and cleaning of segments by run id."""

from __future__ import annotations

from pathlib import Path

from tests.unit.xccl.ports import SMALL
from xdeepserve.xccl import Port, leftovers, list_segments, unlink_all


def test_segments_of_a_run_are_listed_and_unlinked(run_id: str) -> None:
    ports = [Port(run_id, name, rank, layout=SMALL) for rank, name in enumerate(["a-1", "b"])]
    with Port(f"{run_id}.x", "c", 0, layout=SMALL):
        listed = list_segments(run_id)
        assert [(info.name, info.rank, info.is_running) for info in listed] == [
            ("a-1", 0, True),
            ("b", 1, True),
        ]
        assert {info.num_bytes for info in listed} == {SMALL.segment_bytes}
        removed = unlink_all(run_id)
        assert [path.name for path in removed] == [f"xds-{run_id}-a-1", f"xds-{run_id}-b"]
        assert list_segments(run_id) == []
        assert len(list_segments(f"{run_id}.x")) == 1
    for port in ports:
        port.close()


def test_unlinked_ranks_go_on(run_id: str) -> None:
    with (
        Port(run_id, "a", 0, layout=SMALL) as a,
        Port(run_id, "b", 1, layout=SMALL) as b,
    ):
        a.attach(b.blob())
        b.attach(a.blob())
        assert a.unlink()
        assert not a.unlink()
        a.send(1, b"still here")
        out = bytearray(20)
        assert b.recv(0, out) == (10, 0)


def test_a_closed_segment_is_a_leftover_while_its_name_remains(run_id: str) -> None:
    port = Port(run_id, "a", 0, layout=SMALL)
    port.close_segment()
    assert [info.name for info in leftovers() if info.run_id == run_id] == ["a"]
    port.close()


def test_what_is_not_ours_is_not_touched(run_id: str) -> None:
    readable = Path(f"/dev/shm/xds-{run_id}-readable")
    readable.write_bytes(b"not a segment")
    readable.chmod(0o644)
    try:
        assert list_segments(run_id) == []
        assert unlink_all(run_id) == []
        assert readable.exists()
    finally:
        readable.unlink()


def test_garbage_with_our_name_is_listed_as_unknown(run_id: str) -> None:
    garbage = Path(f"/dev/shm/xds-{run_id}-garbage")
    garbage.write_bytes(bytes(5000))
    garbage.chmod(0o600)
    (info,) = list_segments(run_id)
    assert (info.rank, info.pid, info.num_bytes) == (-1, 0, 5000)
    assert unlink_all(run_id) == [garbage]
