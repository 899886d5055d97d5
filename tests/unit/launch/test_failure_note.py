"""Notes of processes that end: read by pid, bounded, never in the way of the error itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xdeepserve.errors import ConfigError
from xdeepserve.launch.failure_note import MAX_MESSAGE_CHARS, leave_note, read_note
from xdeepserve.launch.run_dir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    path = tmp_path / "xds-00000000"
    path.mkdir(mode=0o700)
    return RunDirectory.open(path)


def test_the_note_of_one_process_is_not_that_of_another(run: RunDirectory) -> None:
    assert read_note(run, "dp0", os.getpid()) == ""
    leave_note(run, "dp0", ConfigError("x=1 is wrong"))
    assert read_note(run, "dp0", os.getpid()) == "x=1 is wrong"
    assert read_note(run, "dp0", os.getpid() + 1) == ""
    assert read_note(run, "dp1", os.getpid()) == ""


def test_a_bug_is_named_with_its_type_and_long_words_are_cut(run: RunDirectory) -> None:
    leave_note(run, "dp0", ValueError("y" * 10_000))
    note = read_note(run, "dp0", os.getpid())
    assert note.startswith("ValueError: yyy")
    assert len(note) == MAX_MESSAGE_CHARS


def test_damaged_and_impossible_notes_say_nothing(run: RunDirectory) -> None:
    run.error_path("dp0").write_bytes(b'{"pid":')
    assert read_note(run, "dp0", os.getpid()) == ""
    run.error_path("dp0").unlink()
    run.path.rmdir()
    leave_note(run, "dp0", ConfigError("nowhere to be written"))
    assert read_note(run, "dp0", os.getpid()) == ""
