"""Roster: what a listener is told when memberships follow each other."""

from __future__ import annotations

import pytest

from tests.multiproc.cluster_harness import Recorder
from xdeepserve.errors import EngineDeadError
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.roster import Roster
from xdeepserve.launch.supervisor.messages import Member, Membership, WorkerState


def make_membership(epoch: int, *members: tuple[str, WorkerState, int]) -> Membership:
    def make_member(name: str, state: WorkerState, incarnation: int) -> Member:
        role = "attention" if name.startswith("dp") else "expert"
        spec = WorkerSpec(name=name, role=role, rank=int(name[-1]))
        return Member(
            spec=spec, state=state, incarnation=incarnation, num_restarts=0, socket=f"{name}.sock"
        )

    made = tuple(make_member(*member) for member in members)
    return Membership(epoch=epoch, run_id="0" * 8, counts={}, members=made)


async def test_a_life_of_a_group() -> None:
    recorder = Recorder()
    roster = Roster(recorder)
    starting, ready = WorkerState.STARTING, WorkerState.READY
    await roster.update(make_membership(1, ("dp0", starting, 1), ("expert0", ready, 1)))
    assert recorder.events == []
    await roster.update(make_membership(2, ("dp0", ready, 1)))
    assert recorder.events == [("joined", "dp0", 1)]
    for epoch, state in enumerate((WorkerState.FROZEN, WorkerState.BACKOFF, starting, ready), 3):
        await roster.update(make_membership(epoch, ("dp0", state, 2)))
    assert recorder.events == [("joined", "dp0", 1)]
    for epoch in (7, 8):
        await roster.update(make_membership(epoch, ("dp0", WorkerState.DRAINING, 2)))
    assert (roster.names, roster.epoch) == ({"dp0"}, 8)
    await roster.update(make_membership(9))
    assert recorder.events[1:] == [("draining", "dp0", 2), ("left", "dp0", 2)]
    assert roster.names == set()


async def test_drained_and_wanted_again() -> None:
    recorder = Recorder()
    roster = Roster(recorder)
    await roster.update(make_membership(1, ("dp0", WorkerState.READY, 1)))
    await roster.update(make_membership(2, ("dp0", WorkerState.DRAINING, 1)))
    await roster.update(make_membership(3, ("dp0", WorkerState.READY, 2)))
    kinds = [(kind, incarnation) for kind, _, incarnation in recorder.events]
    assert kinds == [("joined", 1), ("draining", 1), ("left", 1), ("joined", 2)]


class Refusing(Recorder):
    """Cannot join anybody at first."""

    is_refusing = True

    async def joined(self, member: Member) -> None:
        if self.is_refusing:
            raise EngineDeadError("not yet")
        await super().joined(member)


async def test_a_refused_member_is_tried_again() -> None:
    listener = Refusing()
    roster = Roster(listener)
    membership = make_membership(1, ("dp0", WorkerState.READY, 1))
    with pytest.raises(EngineDeadError):
        await roster.update(membership)
    assert (roster.names, roster.epoch) == (set(), -1)
    listener.is_refusing = False
    await roster.update(membership)
    assert (roster.names, roster.epoch) == ({"dp0"}, 1)
