"""MeterFile: what was counted outlives the process, is never half a count, and is found again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xdeepserve.errors import CapacityError, ConfigError
from xdeepserve.maas.ledger.meter import SLOT_BYTES, Ending, MeterFile, dead_files
from xdeepserve.maas.ledger.prices import TokenCounts

COUNTS = TokenCounts(prompt=3, cached=1, completion=2)


def test_the_life_of_a_slot(tmp_path: Path) -> None:
    meters = MeterFile(tmp_path / "a.meter", num_slots=2)
    meter = meters.claim("chatcmpl-1")
    assert meters.read(meter.slot).counts == TokenCounts()
    for completion in range(5):
        meter.record(TokenCounts(3, 1, completion))
        assert meters.read(meter.slot).counts == TokenCounts(3, 1, completion)
    assert meters.read(meter.slot).ending is Ending.CRASH
    meter.finish(Ending.LENGTH, 7)
    read = meters.read(meter.slot)
    assert (read.request_id, read.ending, read.finished_us) == ("chatcmpl-1", Ending.LENGTH, 7)
    assert meters.num_open == 1
    meters.free(meter.slot)
    assert meters.num_open == 0
    again = [meters.claim("x"), meters.claim("y")]
    assert {meters.read(each.slot).counts for each in again} == {TokenCounts()}
    assert {meters.read(each.slot).ending for each in again} == {Ending.CRASH}


def test_there_are_only_so_many(tmp_path: Path) -> None:
    meters = MeterFile(tmp_path / "a.meter", num_slots=2)
    for name in ("x", "y"):
        meters.claim(name)
    with pytest.raises(CapacityError):
        meters.claim("z")
    meters.free(0)
    assert meters.claim("z").slot == 0


def test_a_count_that_is_written_half_does_not_count(tmp_path: Path) -> None:
    meters = MeterFile(tmp_path / "a.meter", num_slots=1)
    meter = meters.claim("x")
    meter.record(COUNTS)
    before = (tmp_path / "a.meter").read_bytes()
    meter.record(TokenCounts(3, 1, 1 << 40))
    after = bytearray((tmp_path / "a.meter").read_bytes())
    differing = [i for i in range(SLOT_BYTES) if before[i] != after[i]]
    meters.close()
    for kept in range(len(differing)):  # a process that ended before the last byte, which switches
        torn = bytearray(before)
        for i in sorted(differing, reverse=True)[:kept]:
            torn[i] = after[i]
        (tmp_path / "b.meter").write_bytes(torn)
        (found,) = MeterFile(tmp_path / "b.meter").left_over()
        assert found.counts == COUNTS
        (tmp_path / "b.meter").unlink()
    assert differing[0] == 1


COUNTING = """
import sys
from pathlib import Path
from xdeepserve.maas.ledger.meter import Ending, MeterFile
from xdeepserve.maas.ledger.prices import TokenCounts

meters = MeterFile(Path(sys.argv[1]))
ended, running = meters.claim("ended"), meters.claim("running")
meters.free(meters.claim("free").slot)
ended.record(TokenCounts(1, 0, 1))
ended.finish(Ending.STOP, 9)
for count in range(10**9):
    running.record(TokenCounts(7, 0, count))
    if count == 1000:
        print("counting", flush=True)
"""


def test_a_killed_process_leaves_its_counts(tmp_path: Path) -> None:
    path = tmp_path / "a.meter"
    command = [sys.executable, "-c", COUNTING, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as counting:
        assert counting.stdout is not None
        assert counting.stdout.readline() == b"counting\n"
        assert list(dead_files(tmp_path)) == []
        with pytest.raises(ConfigError):
            MeterFile(path)
        os.kill(counting.pid, signal.SIGKILL)
    (meters,) = dead_files(tmp_path)
    ended, running = sorted(meters.left_over(), key=lambda metered: metered.request_id)
    assert (ended.counts, ended.ending) == (TokenCounts(1, 0, 1), Ending.STOP)
    assert (running.counts.prompt, running.ending) == (7, Ending.CRASH)
    assert running.counts.completion >= 1000
    for each in (ended, running):
        meters.free(each.slot)
    meters.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_open_slots_stays(tmp_path: Path) -> None:
    meters = MeterFile(tmp_path / "a.meter", num_slots=4)
    meters.claim("x").record(COUNTS)
    meters.flush()
    meters.close()
    (found,) = dead_files(tmp_path)
    assert [left.counts for left in found.left_over()] == [COUNTS]
    found.close()
    assert (tmp_path / "a.meter").is_file()
