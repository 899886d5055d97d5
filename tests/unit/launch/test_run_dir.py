"""Run directories: lease, identity locks, choice of a run, cleaning what dead runs leave."""

from __future__ import annotations

import os
import secrets
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from xdeepserve import envs
from xdeepserve.errors import ConfigError
from xdeepserve.launch.process_identity import ProcessIdentity, sample_process
from xdeepserve.launch.run_dir import (
    SHM_FOLDER,
    IdentityLock,
    NameTaken,
    RunDirectory,
    choose_run,
    clean_dead_runs,
    create_run,
    find_runs,
    living_runs,
    lock_holder,
)

HOLD_LOCK = [
    sys.executable,
    "-c",
    "import pathlib, sys, threading\n"
    "from xdeepserve.launch.run_dir import IdentityLock\n"
    "lock = IdentityLock(pathlib.Path(sys.argv[1]))\n"
    "print(flush=True)\n"
    "threading.Event().wait()",
]
"""A process that holds a lock file, as a worker of some other run would."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with envs.RUN_DIR.override(str(tmp_path)):
        yield tmp_path


def test_a_run_lives_as_long_as_its_lease() -> None:
    run, lease = create_run()
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert run.gateway() == ProcessIdentity.own()
    assert living_runs() == [run] == [choose_run(None)] == [choose_run(run.run_id)]
    lease.release()
    lease.release()
    assert run.gateway() is None
    assert (living_runs(), find_runs()) == ([], [run])
    run.remove()


def test_a_lock_has_one_holder(folder: Path) -> None:
    path = folder / "dp0.lock"
    assert lock_holder(path) is None
    lock = IdentityLock(path)
    with pytest.raises(NameTaken, match=r"dp0\.lock is held"):
        IdentityLock(path)
    assert lock_holder(path) == ProcessIdentity.own()
    lock.release()
    assert lock_holder(path) is None
    IdentityLock(path).release()


def test_who_ever_was_of_a_run() -> None:
    run, lease = create_run()
    held, left = (IdentityLock(run.lock_path(name)) for name in ("dp0", "expert0"))
    left.release()
    assert run.lock_holders() == {"dp0": ProcessIdentity.own(), "expert0": None}
    held.release()
    lease.release()


def test_a_file_is_on_the_disk_before_it_replaces_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, lease = create_run()
    before, after = ProcessIdentity(1, 2), ProcessIdentity(30, 40)
    run.write(run.state_path, before)
    seen: list[tuple[bytes, int]] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: seen.append((run.state_path.read_bytes(), os.fstat(file).st_size))
    )
    run.write(run.state_path, after)
    assert seen == [(msgspec.json.encode(before), len(msgspec.json.encode(after)))]
    assert run.state_path.read_bytes() == msgspec.json.encode(after)
    lease.release()


def test_a_path_too_long_for_sockets_is_refused_before_anything_is_made(folder: Path) -> None:
    long = folder / ("x" * 80)
    long.mkdir()
    with (
        envs.RUN_DIR.override(str(long)),
        pytest.raises(ConfigError, match=r"limit is 107; .*XDEEPSERVE_RUN_DIR"),
    ):
        create_run()
    assert list(long.iterdir()) == []


def test_a_process_knows_when_it_started() -> None:
    before_s = time.time()
    with subprocess.Popen(["sleep", "60"]) as process:
        started_at_s = ProcessIdentity.of(process.pid).started_at_s
        process.kill()
    # Both the boot time and a process's start are cut to whole units.
    assert before_s - 2 < started_at_s < time.time() + 2


def test_cleaning_spares_the_living() -> None:
    living, lease = create_run()
    dead, dead_lease = create_run()
    segments = [SHM_FOLDER / f"xds-{run.run_id}-test" for run in (living, dead)]
    for segment in segments:
        segment.touch()
    dead_lease.release()
    assert clean_dead_runs() == [dead]
    assert [segment.exists() for segment in segments] == [True, False]
    assert find_runs() == [living]
    lease.release()
    living.remove()
    assert not segments[0].exists()


def test_choice_among_runs() -> None:
    with pytest.raises(ConfigError, match="no disaggregated service is running"):
        choose_run(None)
    (first, lease1), (second, lease2) = create_run(), create_run()
    with pytest.raises(ConfigError, match="name one with --run-id"):
        choose_run(None)
    assert choose_run(second.run_id) == second
    with pytest.raises(ConfigError, match=f"'nope' is running here; running: .*{first.run_id}"):
        choose_run("nope")
    for run, lease in ((first, lease1), (second, lease2)):
        lease.release()
        run.remove()


def test_foreign_folders_are_no_runs(folder: Path) -> None:
    for name in ("xds-1234", "xds-zzzzzzzz", "xds-12345678.old"):
        (folder / name).mkdir()
    (folder / "xds-12345678").touch()
    assert find_runs() == []
    for name in ("xds-1234", "xds-12345678", "missing"):
        with pytest.raises(ConfigError, match="is no run directory"):
            RunDirectory.open(folder / name)


@pytest.fixture
def segment() -> Iterator[Path]:
    """A segment as of a run whose folder somebody else may have made."""
    path = SHM_FOLDER / f"xds-{secrets.token_hex(4)}-test"
    path.touch()
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind", ["link to a run", "link", "file", "open to others"])
def test_cleaning_leaves_alone_what_is_no_run_folder(
    folder: Path, segment: Path, kind: str
) -> None:
    run_id = segment.name.split("-")[1]
    name, other = folder / f"xds-{run_id}", folder / "other"
    other.mkdir(mode=0o700)
    if kind == "link to a run":
        real = other / "xds-00000000"
        real.mkdir(mode=0o700)
        name.symlink_to(real)
    elif kind == "link":
        name.symlink_to(other)
    elif kind == "file":
        name.touch(mode=0o700)
    else:
        name.mkdir(mode=0o755)
    bystander = subprocess.Popen([*HOLD_LOCK, str(other / "dp0.lock")], stdout=subprocess.PIPE)
    with bystander:
        assert bystander.stdout is not None
        bystander.stdout.readline()
        assert clean_dead_runs() == [] == find_runs()
        assert bystander.poll() is None
        bystander.kill()
    assert segment.exists()
    with pytest.raises(ConfigError, match="no link"):
        RunDirectory.open(name)


def test_segments_of_other_users_and_other_kinds_are_not_unlinked(
    segment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = segment.name.split("-")[1]
    run, lease = create_run()
    same_name = RunDirectory(run.path, run_id)
    link = SHM_FOLDER / f"xds-{run_id}-link"
    link.symlink_to(run.path / "lease")
    assert same_name.shared_segments() == [segment]
    uid = os.geteuid()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: uid + 1)
        assert same_name.shared_segments() == []
        assert find_runs() == []
    link.unlink()
    lease.release()
    run.remove()


def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    with (
        envs.RUN_DIR.override(str(folder / "missing")),
        pytest.raises(ConfigError, match="set XDEEPSERVE_RUN_DIR"),
    ):
        create_run()


class _State(msgspec.Struct):
    value: int


def test_files_are_replaced_in_one_step() -> None:
    run, lease = create_run()
    run.write(run.state_path, _State(1))
    with run.state_path.open("rb") as before:
        run.write(run.state_path, _State(2))
        assert before.read() == b'{"value":1}'
    assert run.state_path.read_bytes() == b'{"value":2}'
    assert {path.name for path in run.path.iterdir()} == {"lease", "state.json"}
    lease.release()
    run.remove()


def test_identity_survives_reuse_of_a_pid() -> None:
    own = ProcessIdentity.own()
    assert own.is_alive()
    former = ProcessIdentity(own.pid, own.start_time - 1)
    assert not former.is_alive()
    assert former.open_pidfd() is None
    pidfd = own.open_pidfd()
    assert pidfd is not None
    os.close(pidfd)
    sample = sample_process(own.pid)
    assert sample is not None
    assert not sample.is_stopped
    assert sample_process(2**22 + 1) is None
