"""From one placement to another in bounded ticks, valid at every moment.

    LOAD   the ranks load the incoming experts beside what they hold; routing is as before
    FLIP   one new routing table sends tokens to them; exchanges under way end on the old one
    DROP   nothing uses the replaced experts any more; their memory is free

The caller carries out a tick, waits until that is done everywhere, and asks for the next. It may
stop after any tick: `placement` is what is in force, and all that it names is held.

A slot can change on its own while its expert has another replica. What then remains are cycles of
experts with one replica each; a cycle flips as a whole, or, where it is too long for one tick, as
a chain of exchanges between two ranks.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from xdeepserve.eplb.placement import (
    EMPTY,
    ExpertPlacement,
    align_slots,
    check_placement,
    require_same_shape,
)
from xdeepserve.errors import ConfigError


class Phase(enum.StrEnum):
    """What a tick asks for."""

    LOAD = "load"
    FLIP = "flip"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class ExpertMove:
    """One slot of one layer gets another expert.

    Attributes:
        layer_idx: the layer.
        expert: the incoming expert; -1 = the slot becomes empty.
        from_rank: a rank that holds it (to_rank itself, if it does); -1 = only the weights file.
        to_rank: the rank that loads it.
        slot: physical slot, of to_rank.
        replaced: the expert that leaves; -1 = the slot was empty.
    """

    layer_idx: int
    expert: int
    from_rank: int
    to_rank: int
    slot: int
    replaced: int


@dataclass(frozen=True, slots=True)
class MigrationTick:
    """One bounded piece of work.

    Attributes:
        phase: LOAD, FLIP or DROP; each chunk of moves passes through them in this order.
        moves: LOAD: experts new to their rank; FLIP: the whole chunk; DROP: experts that are
            nowhere on their rank any more.
        placement: in force once this tick is done; FLIP is the only phase that changes it.
    """

    phase: Phase
    moves: tuple[ExpertMove, ...]
    placement: ExpertPlacement


@dataclass(frozen=True, slots=True)
class _Change:
    """A slot, the expert that leaves and the one that comes."""

    slot: int
    old: int
    new: int


_Group = tuple[_Change, ...]
"""Changes that must flip together."""


def migrate(
    current: ExpertPlacement,
    target: ExpertPlacement,
    *,
    max_moves: int = 8,
    max_staged_per_rank: int = 2,
    layers: Sequence[int] | None = None,
) -> Iterator[MigrationTick]:
    """Plan the way from current to target, lazily, one chunk after the other.

    Args:
        current: in force now; experts without a replica (after a failure) are restored first.
        target: where to go; every expert has a replica. Slots within a rank may be renumbered.
        max_moves: most moves of a tick, at least 2.
        max_staged_per_rank: most experts a rank holds beyond its slots at any time, at least 1.
        layers: layers to migrate, in this order; None = all.

    Yields:
        LOAD, FLIP, DROP for each chunk; a phase with nothing to do is left out.

    Raises:
        ConfigError: the placements differ in shape, or a limit is too small.
        IntegrityError: the target lacks an expert.
    """
    require_same_shape(current, target)
    check_placement(target)
    if max_moves < 2 or max_staged_per_rank < 1:
        raise ConfigError(
            f"max_moves={max_moves} must be at least 2 and max_staged_per_rank="
            f"{max_staged_per_rank} at least 1, or two experts could never change places"
        )
    return _ticks(current, align_slots(target, current), max_moves, max_staged_per_rank, layers)


def _ticks(
    current: ExpertPlacement,
    target: ExpertPlacement,
    max_moves: int,
    max_staged: int,
    layers: Sequence[int] | None,
) -> Iterator[MigrationTick]:
    chunk = _Chunk(current, max_moves, max_staged)
    for layer_idx in range(current.num_layers) if layers is None else layers:
        row = current.physical_to_logical[layer_idx].tolist()
        wanted = target.physical_to_logical[layer_idx].tolist()
        for group in _groups(row, wanted, chunk.can_hold):
            if not chunk.fits(layer_idx, group):
                yield from chunk.flush()
            chunk.add(layer_idx, group)
    yield from chunk.flush()


class _Chunk:
    """The moves of the next ticks, and the placement in force before them."""

    def __init__(self, placement: ExpertPlacement, max_moves: int, max_staged: int) -> None:
        self._placement = placement
        self._max_moves = max_moves
        self._max_staged = max_staged
        self._moves: list[ExpertMove] = []

    def can_hold(self, group: _Group) -> bool:
        """Whether an empty chunk takes the group."""
        return len(group) <= self._max_moves and self._staged_ok([c.slot for c in group])

    def fits(self, layer_idx: int, group: _Group) -> bool:
        """Whether the group can join: limits kept, and no slot changed twice."""
        taken = {(m.layer_idx, m.slot) for m in self._moves}
        slots = [m.slot for m in self._moves] + [c.slot for c in group]
        return (
            len(slots) <= self._max_moves
            and self._staged_ok(slots)
            and not any((layer_idx, c.slot) in taken for c in group)
        )

    def _staged_ok(self, slots: Sequence[int]) -> bool:
        ranks = [slot // self._placement.slots_per_rank for slot in slots]
        return max(map(ranks.count, ranks), default=0) <= self._max_staged

    def add(self, layer_idx: int, group: _Group) -> None:
        per_rank = self._placement.slots_per_rank
        for change in group:
            to_rank = change.slot // per_rank
            source = self._source(layer_idx, change.new, to_rank)
            self._moves.append(
                ExpertMove(layer_idx, change.new, source, to_rank, change.slot, change.old)
            )

    def _source(self, layer_idx: int, expert: int, to_rank: int) -> int:
        """A rank that holds the expert before this chunk: to_rank, or the lowest; -1 = none."""
        if expert == EMPTY:
            return EMPTY
        slots = self._placement.logical_to_physical[layer_idx, expert]
        ranks = (slots[slots != EMPTY] // self._placement.slots_per_rank).tolist()
        return to_rank if to_rank in ranks else min(ranks, default=EMPTY)

    def flush(self) -> Iterator[MigrationTick]:
        """The ticks of the moves collected; the chunk is empty afterwards."""
        moves, self._moves = tuple(self._moves), []
        if not moves:
            return
        incoming = _incoming(moves)
        if incoming:
            yield MigrationTick(Phase.LOAD, incoming, self._placement)
        table = self._placement.physical_to_logical.copy()
        for move in moves:
            table[move.layer_idx, move.slot] = move.expert
        self._placement = self._placement.with_physical(table)
        yield MigrationTick(Phase.FLIP, moves, self._placement)
        leaving = _leaving(moves, self._placement)
        if leaving:
            yield MigrationTick(Phase.DROP, leaving, self._placement)


def _incoming(moves: tuple[ExpertMove, ...]) -> tuple[ExpertMove, ...]:
    """One move for each expert that is new to its rank."""
    incoming = {
        (move.layer_idx, move.to_rank, move.expert): move
        for move in moves
        if move.expert != EMPTY and move.from_rank != move.to_rank
    }
    return tuple(incoming.values())


def _leaving(moves: tuple[ExpertMove, ...], placement: ExpertPlacement) -> tuple[ExpertMove, ...]:
    """One move for each expert that is nowhere on its rank any more."""
    by_rank = placement.by_rank()
    leaving = {
        (move.layer_idx, move.to_rank, move.replaced): move
        for move in moves
        if move.replaced != EMPTY
        and not (by_rank[move.layer_idx, move.to_rank] == move.replaced).any()
    }
    return tuple(leaving.values())


def _groups(
    row: list[int], wanted: list[int], can_hold: Callable[[_Group], bool]
) -> Iterator[_Group]:
    """Groups of changes of one layer; after each of them every expert still has a replica."""
    counts = Counter(row)
    surplus = counts - Counter(wanted)
    pending = [_Change(slot, *ends) for slot, ends in enumerate(zip(row, wanted, strict=True))]
    pending = [change for change in pending if change.old != change.new]
    # lost experts first, then empty slots, then replicas that are too many anyway
    pending.sort(
        key=lambda c: (c.new == EMPTY or counts[c.new] > 0, c.old != EMPTY, c.old not in surplus)
    )
    progress = True
    while progress:
        blocked = []
        for change in pending:
            if change.old == EMPTY or counts[change.old] > 1:
                counts[change.old] -= 1
                counts[change.new] += 1
                yield (change,)
            else:
                blocked.append(change)
        progress = len(blocked) < len(pending)
        pending = blocked
    for cycle in _cycles(pending):
        if can_hold(cycle):
            yield cycle
        else:
            yield from _exchanges(cycle)


def _cycles(changes: list[_Change]) -> Iterator[_Group]:
    """What is blocked forms cycles: each change brings the expert that the next one gives up.

    Every expert that leaves has its only replica here, so its new place is here too, and the
    experts that come are exactly those that leave.
    """
    by_old = {change.old: change for change in changes}
    assert len(by_old) == len(changes), "a blocked expert has one replica"
    while by_old:
        first = next(iter(by_old))
        cycle = [by_old.pop(first)]
        while cycle[-1].new != first:
            cycle.append(by_old.pop(cycle[-1].new))
        yield tuple(cycle)


def _exchanges(cycle: _Group) -> Iterator[_Group]:
    """A cycle as exchanges of two slots; its first expert travels along to the last slot.

    The two slots are on different ranks: one rank still wants the expert that the other gives up.
    """
    traveller = cycle[0].old
    for here, there in itertools.pairwise(cycle):
        yield (
            _Change(here.slot, traveller, there.old),
            _Change(there.slot, there.old, traveller),
        )
