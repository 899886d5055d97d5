"""Two runs never choose cores at the same time: each sees what the other has pinned."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator, Sequence

import pytest

from tests.multiproc.cluster_harness import make_service, run_folder
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.run_dir import RunDirectory, create_run
from xdeepserve.launch.supervisor import supervisor
from xdeepserve.launch.supervisor.pinning import choosing_cores


@pytest.fixture
def run() -> Iterator[RunDirectory]:
    with run_folder():
        run, lease = create_run()
        yield run
        lease.release()


def is_chosen_by_somebody(run: RunDirectory) -> bool:
    descriptor = os.open(run.path.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def test_one_run_at_a_time_and_nothing_is_left(run: RunDirectory) -> None:
    with choosing_cores(run):
        assert is_chosen_by_somebody(run)
    assert not is_chosen_by_somebody(run)
    assert list(run.path.parent.iterdir()) == [run.path]


def test_who_is_stuck_does_not_keep_others(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    with choosing_cores(run), choosing_cores(run, timeout_s=0.02):
        assert caplog.messages == ["cores are chosen beside another run that chooses for 0.02 s"]


def test_a_folder_that_cannot_be_locked_keeps_nobody(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with choosing_cores(run):
        assert "without a lock" in caplog.text


async def test_the_supervisor_publishes_what_it_chose_before_others_choose(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def choose(workers: Sequence[WorkerSpec], *_: object) -> Sequence[WorkerSpec]:
        seen.append(is_chosen_by_somebody(run))
        return workers

    write = RunDirectory.write

    def publish(self: RunDirectory, *args: object) -> None:
        seen.append(is_chosen_by_somebody(run))
        write(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(supervisor, "pinned", choose)
    monkeypatch.setattr(RunDirectory, "write", publish)
    starting = supervisor.Supervisor(run, make_service(1, 0))
    starting._restore()
    for task in starting._tasks.values():
        task.cancel()
    assert seen == [True, True]
    assert not is_chosen_by_somebody(run)
