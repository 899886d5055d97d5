"""A rank is killed at each step of dispatch/combine and of a forward; then results are equal.

The default run takes a sample of the points, `-m soak` all of them at several visits.
"""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.multiproc.xccl.processes import Process, Run
from tests.multiproc.xccl.test_crowd import EXPERTS, HIDDEN, stop
from tests.multiproc.xccl.test_kill import KILLED, join_again
from tests.multiproc.xccl.workers import WAIT_S, EpMember, layer_by_hand, leave
from xdeepserve.errors import PeerLost
from xdeepserve.xccl import FORWARD, Exchange, Port, Tag
from xdeepserve.xccl.trampoline import LOST_DETAIL

DISPATCH = ("post_copied", "post_published")
SERVE = ("taken", "reply_copied", "reply_published", "reply_seen")
POINTS = (*DISPATCH, *SERVE)


def sampled(
    sample: set[tuple[str, int]], points: tuple[str, ...], visits: tuple[int, ...]
) -> list[object]:
    """All points at all visits; those that are not in the sample only with the soak tests."""
    return [
        pytest.param(point, visit, marks=[pytest.mark.soak] * ((point, visit) not in sample))
        for point in points
        for visit in visits
    ]


def check_lost(error: PeerLost) -> None:
    """Exactly the rank that was killed."""
    assert error.ranks == (1,)


# An EP group of ranks 0 and 2, which live here, and 1, which is killed. It visits each point once
# per rank and step.

RANKS = [0, 1, 2]
STEPS = 9
EP_SAMPLE = {
    ("post_copied", 2),
    ("taken", 4),
    ("reply_copied", 3),
    ("reply_seen", 5),
}


@pytest.mark.parametrize(("point", "visit"), sampled(EP_SAMPLE, POINTS, (1, 2, 3, 4, 5, 6)))
def test_killed_in_an_ep_group(run: Run, point: str, visit: int) -> None:
    members, dying = start_group(run, fault=point, countdown=visit)
    lost_at = run_group(members, first_step=0, epoch=1)
    assert dying.end()[0] == KILLED
    check_group_goes_on(run, members, lost_at)


@pytest.mark.soak
def test_killed_in_an_ep_group_before_it_sleeps(run: Run) -> None:
    members, dying = start_group(run, fault="about_to_sleep")
    assert dying.end()[0] == KILLED  # it had dispatched, and waited for ours
    check_group_goes_on(run, members, run_group(members, first_step=0, epoch=1))


def start_group(run: Run, **fault: object) -> tuple[list[EpMember], Process]:
    ports = [run.port(0), run.port(2)]
    dying = run.start("ep_rank", rank=1, peers=RANKS, ranks=RANKS, steps=STEPS, **fault)
    for port in ports * 2:  # twice: a port is linked once it is attached there, too
        port.discover()
    for port in ports:
        port.wait_linked(RANKS, WAIT_S)
    return [EpMember(port, RANKS) for port in ports], dying


def run_group(members: list[EpMember], *, first_step: int, epoch: int) -> int:
    """Steps until rank 1 is lost, or to the end: the step that is not done."""
    for step_idx in range(first_step, STEPS):
        try:
            for member in members:
                member.begin(Tag(epoch, step_idx, 0, 0))
            for member in members:
                member.serve()
            for member in members:
                member.finish()
        except PeerLost as error:
            check_lost(error)
            for member in members:
                member.exchange.release()
            return step_idx
    return STEPS


def check_group_goes_on(run: Run, members: list[EpMember], lost_at: int) -> None:
    """The next life of rank 1 takes part from the lost step on; no slot stays taken."""
    assert lost_at < STEPS
    first, second = (member.port for member in members)
    again = join_again(
        first, run, "ep_rank", peers=RANKS, ranks=RANKS, steps=STEPS, first_step=lost_at, epoch=2
    )
    second.wait_linked(RANKS, WAIT_S)
    assert run_group(members, first_step=lost_at, epoch=2) == STEPS
    for member in members:
        leave(member.port, RANKS)
    assert again.result() == {"steps": STEPS - lost_at}


# Experts 0 and 1 live on rank 1, 2 and 3 on rank 2, 4 and 5 on rank 3; rank 0 asks a trampoline.

OWNERS = np.array([1, 1, 2, 2, 3, 3], np.int32)
FORWARD_SAMPLE = {("post_copied", 2), ("reply_copied", 1)}


class Asking:
    """One forwarded exchange and what it must give."""

    def __init__(self, port: Port, first_expert: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.hidden = rng.standard_normal((7, HIDDEN), dtype=np.float32)
        self.ids = rng.integers(first_expert, EXPERTS, (7, 3)).astype(np.int32)
        self.weights = rng.random((7, 3), dtype=np.float32)
        self.epoch = 1
        self.port, self.seed = port, seed

    def ask(self, trampoline: int) -> Exchange:
        self.exchange = self.port.a2e(
            tag=self.tag(),
            hidden_states=self.hidden,
            topk_ids=self.ids,
            expert_rank=through(trampoline),
            kind=FORWARD,
        )
        return self.exchange

    def ask_again(self, lost: int, trampoline: int) -> None:
        self.epoch += 1
        assert self.exchange.reroute([lost], through(trampoline), self.tag())

    def tag(self) -> Tag:
        return Tag(self.epoch, self.seed, 4, 0)

    def check(self) -> None:
        """The results equal the layer computed by hand, however they came about."""
        got = self.exchange.e2a(self.weights, hidden_size=HIDDEN, timeout_s=WAIT_S)
        assert np.array_equal(got, layer_by_hand(self.hidden, self.ids, self.weights))
        self.exchange.release()


def through(trampoline: int) -> np.ndarray:
    return np.full(EXPERTS, trampoline, np.int32)


def start_experts(run: Run, dying: int, **fault: object) -> tuple[Port, dict[int, Process]]:
    port = run.port(0)
    experts = {
        rank: run.start("expert", rank=rank, **EXPERT, **(fault if rank == dying else {}))
        for rank in (1, 2, 3)
    }
    port.wait_linked([1, 2, 3], WAIT_S)
    return port, experts


EXPERT = {"peers": [0, 1, 2, 3], "owners": OWNERS.tolist(), "hidden_size": HIDDEN}


@pytest.mark.parametrize(("point", "visit"), sampled(FORWARD_SAMPLE, POINTS, (1, 2)))
def test_killed_trampoline(run: Run, point: str, visit: int) -> None:
    """Its asker goes through another one; through its next life once it has one."""
    port, experts = start_experts(run, 1, fault=point, countdown=visit)
    for step_idx in range(3):
        asking = Asking(port, first_expert=2, seed=step_idx)
        exchange = asking.ask(1)
        try:
            exchange.wait(WAIT_S)
        except PeerLost as error:
            check_lost(error)
            asking.ask_again(1, 2)
            asking.check()
            break
        asking.check()
    assert experts[1].end()[0] == KILLED

    asking = Asking(port, first_expert=0, seed=10)
    asking.ask(2).wait(WAIT_S)  # which needs the experts of the dead rank
    (part,) = asking.exchange.parts
    assert (asking.exchange.refused_ranks, part.detail) == ([2], LOST_DETAIL)
    experts[1] = start_again(port, run, 1)
    asking.ask_again(2, 1)
    asking.check()
    end(port, experts)


@pytest.mark.parametrize(
    ("point", "visit"),
    sampled({("reply_copied", 2)}, ("taken", "reply_copied"), (1, 2, 3)),
)
def test_killed_owner_behind_a_trampoline(run: Run, point: str, visit: int) -> None:
    """The trampoline refuses in time; with the owner's next life it answers."""
    port, experts = start_experts(run, 3, fault=point, countdown=visit)
    for step_idx in range(visit):
        asking = Asking(port, first_expert=0, seed=step_idx)
        asking.ask(1).wait(WAIT_S)
        if asking.exchange.refused_ranks:
            break
        asking.check()
    (part,) = asking.exchange.parts
    assert (asking.exchange.refused_ranks, part.detail) == ([1], LOST_DETAIL)
    assert experts[3].end()[0] == KILLED
    experts[3] = start_again(port, run, 3)
    deadline = time.monotonic() + WAIT_S
    while asking.exchange.refused_ranks:  # until the trampoline has met the new life
        assert time.monotonic() < deadline
        asking.ask_again(1, 1)
        asking.exchange.wait(WAIT_S)
    asking.check()
    end(port, experts)


def start_again(port: Port, run: Run, rank: int) -> Process:
    return join_again(port, run, "expert", rank=rank, **EXPERT)


def end(port: Port, experts: dict[int, Process]) -> None:
    stop(port, *experts)
    for expert in experts.values():
        assert expert.end()[0] == 0
    port.check_integrity()
