"""Roster: turns memberships into joined, draining and left calls for each DP group."""

from __future__ import annotations

from typing import Protocol

from xdeepserve.launch.supervisor.messages import Member, Membership, WorkerState


class MemberListener(Protocol):
    """Told of the DP groups, in order, one call at a time; calls should return soon."""

    async def joined(self, member: Member) -> None:
        """A group can serve at `member.socket`. Raising XDeepServeError asks for another try.

        When its process is restarted, the same group serves at the same socket again: whoever is
        connected notices and connects anew. That is not told.
        """
        ...

    async def draining(self, member: Member) -> None:
        """Send nothing new to it; it ends when its work is done."""
        ...

    async def left(self, member: Member) -> None:
        """It was scaled away and has ended."""
        ...


class Roster:
    """What a listener knows.

    Attributes:
        epoch: of the membership that it knows completely; -1 before the first.
    """

    def __init__(self, listener: MemberListener) -> None:
        self.epoch = -1
        self._listener = listener
        self._known: dict[str, Member] = {}

    @property
    def names(self) -> set[str]:
        """DP groups that have joined and not left."""
        return set(self._known)

    async def update(self, membership: Membership) -> None:
        """Tell the listener what is new.

        Raises:
            XDeepServeError: of `joined`; call again later.
        """
        groups = {m.name: m for m in membership.members if m.spec.role == "attention"}
        for known in list(self._known.values()):
            if _has_left(known, groups.get(known.name)):
                del self._known[known.name]
                await self._listener.left(known)
        for member in groups.values():
            await self._update_group(member)
        self.epoch = membership.epoch

    async def _update_group(self, member: Member) -> None:
        known = self._known.get(member.name)
        if known is None:
            if member.can_serve:
                await self._listener.joined(member)
                self._known[member.name] = member
        elif member.state is WorkerState.DRAINING is not known.state:
            self._known[member.name] = member
            await self._listener.draining(member)


def _has_left(known: Member, now: Member | None) -> bool:
    """Gone, or drained and started again under its old name."""
    if now is None:
        return True
    return known.state is WorkerState.DRAINING and now.incarnation != known.incarnation
