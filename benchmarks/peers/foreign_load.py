"""How much of the machine other programs used while an engine was measured (Linux).

A run that was disturbed says nothing about the engine, so it is repeated.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

MAX_FOREIGN_SHARE: Final = 0.04
"""Share of all cores' time that others may use; the kernel needs some."""

MAX_ATTEMPTS: Final = 4

Answer = TypeVar("Answer")

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


def undisturbed(group: int, run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The answer of `run`, repeated while others disturb it; the least disturbed one counts.

    Args:
        group: the engine's process group; its time, and that of this program, is not foreign.
        run: one measurement.

    Returns:
        The answer, with `foreign_share` added.
    """
    best: dict[str, float] = {}
    for _ in range(MAX_ATTEMPTS):
        answer, share = watched(group, run)
        if not best or share < best["foreign_share"]:
            best = answer | {"foreign_share": share}
        if share <= MAX_FOREIGN_SHARE:
            break
    return best


def watched(group: int, run: Callable[[], Answer]) -> tuple[Answer, float]:
    """(the answer of `run`, share of all cores' time that others used meanwhile)."""
    machine_s, own_s, start_s = _busy_s(), _own_s(group), time.monotonic()
    answer = run()
    wall_s = time.monotonic() - start_s
    foreign_s = (_busy_s() - machine_s) - (_own_s(group) - own_s)
    return answer, max(0.0, foreign_s / (wall_s * (os.cpu_count() or 1)))


def _busy_s() -> float:
    """Seconds that all cores have been busy, stolen time included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / _TICKS_PER_S


def _own_s(group: int) -> float:
    """CPU seconds of this program and of a process group with its ended children."""
    own = os.times()
    return own.user + own.system + sum(_group_member_s(pid, group) for pid in _process_ids())


def _process_ids() -> list[str]:
    return [entry.name for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _group_member_s(pid: str, group: int) -> float:
    """CPU seconds of a process and of its ended children; 0 where it is not of the group."""
    try:
        fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return sum(map(int, fields[11:15])) / _TICKS_PER_S if int(fields[2]) == group else 0.0
