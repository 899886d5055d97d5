"""RoutingFeed: every placement in the state file is seen, whatever its time stamp."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from tests.multiproc.cluster_harness import make_service, run_folder
from xdeepserve.errors import ConfigError
from xdeepserve.launch.fabric import Fabric
from xdeepserve.launch.placement import Placement
from xdeepserve.launch.run_dir import RunDirectory, create_run
from xdeepserve.launch.supervisor.messages import Membership, SavedState
from xdeepserve.launch.worker.routing_feed import RoutingFeed

SERVICE = make_service(1, 2)
STAMP_NS = 1_000_000_000


@pytest.fixture
def run() -> Iterator[RunDirectory]:
    with run_folder():
        run, lease = create_run()
        yield run
        lease.release()


def publish(run: RunDirectory, epoch: int) -> None:
    """A placement, always with the same time stamp, as within a tick of the clock."""
    table = [list(range(8))] * 2
    placement = Placement(epoch=epoch, ffn=(), expert=(0, 1), table=table)
    membership = Membership(epoch=1, run_id=run.run_id, counts={}, members=(), placement=placement)
    run.write(run.state_path, SavedState(membership=membership, incarnations={}))
    os.utime(run.state_path, ns=(STAMP_NS, STAMP_NS))


def make_feed(run: RunDirectory) -> RoutingFeed:
    return RoutingFeed(run, SERVICE, Fabric.of(run.run_id, SERVICE.deployment, SERVICE.shape))


def test_two_files_of_one_time_and_size(run: RunDirectory) -> None:
    publish(run, 1)
    feed = make_feed(run)
    assert feed.routing.current.epoch == 1
    assert feed._read() is None
    publish(run, 2)
    seen = feed._read()
    assert seen is not None
    assert seen.epoch == 2
    assert feed._read() is None


def test_a_file_that_was_changed_in_place(run: RunDirectory) -> None:
    publish(run, 1)
    feed = make_feed(run)
    with run.state_path.open("ab") as file:
        file.write(b"\n")
    os.utime(run.state_path, ns=(STAMP_NS, STAMP_NS))
    assert feed._read() is not None


@pytest.mark.parametrize("damage", [b"", None])
def test_damage_is_told_once_and_passes(
    run: RunDirectory, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    publish(run, 1)
    feed = make_feed(run)
    run.state_path.unlink()
    if damage is not None:
        run.state_path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        assert [feed._read(), feed._read()] == [None, None]
    assert len(caplog.records) == 1
    publish(run, 2)
    seen = feed._read()
    assert seen is not None
    assert seen.epoch == 2


def test_without_a_placement_there_is_no_routing(run: RunDirectory) -> None:
    with pytest.raises(ConfigError, match="is a supervisor running"):
        make_feed(run)
