"""What a migration costs a stream: its longest gap, and at one flip the gap beyond those around.

A step that is longer than others for any reason looks like a stall, so the same is measured at
moments when nothing happened, of the same length and distance: only the difference is the flip's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from statistics import median

import numpy as np

from xdeepserve.testing.watched_streams import StreamRecord

AROUND_S = 1.0
"""Gaps that end so long before a moment, or begin so long after it, tell how long they are else."""

COLUMNS = ("p50_ms", "p99_ms", "longest_ms")
MIN_AROUND = 4
"""Streams with fewer gaps around a moment are left out."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When something may have held up a step; monotonic seconds."""

    begin_s: float
    end_s: float


def quiet_moments(begin_s: float, end_s: float, likes: Sequence[Moment]) -> list[Moment]:
    """As many moments as `likes`, of their median length, evenly spread over a calm time."""
    if not likes:
        return []
    length_s = median(like.end_s - like.begin_s for like in likes)
    distance_s = (end_s - begin_s) / len(likes)
    starts = (begin_s + (n + 0.5) * distance_s for n in range(len(likes)))
    return [Moment(start_s, start_s + length_s) for start_s in starts]


def stalls_ms(moments: Iterable[Moment], records: Iterable[StreamRecord]) -> list[float]:
    """Per moment and stream: its longest gap that overlaps the moment, minus its median around."""
    arrivals = [np.array(record.arrivals_s) for record in records]
    stalls = [stall_ms(moment, each) for moment in moments for each in arrivals]
    return [stall for stall in stalls if stall is not None]


def stall_ms(moment: Moment, arrivals_s: np.ndarray) -> float | None:
    """Of one answer; None where it does not span the moment, or only just."""
    begins, ends = arrivals_s[:-1], arrivals_s[1:]
    spans = (ends > moment.begin_s) & (begins < moment.end_s)
    is_near = (ends > moment.begin_s - AROUND_S) & (begins < moment.end_s + AROUND_S)
    around = is_near & ~spans
    is_within = len(ends) and begins[0] < moment.begin_s and ends[-1] > moment.end_s
    if not is_within or np.count_nonzero(around) < MIN_AROUND:
        return None
    gaps = ends - begins
    return float(gaps[spans].max() - np.median(gaps[around])) * 1e3


def stall_summary(stalls: Sequence[float]) -> dict[str, float]:
    """Of the stalls at one kind of moment, milliseconds."""
    if not stalls:
        return {"count": 0}
    p50, p99 = np.percentile(stalls, (50, 99)).tolist()
    return {"count": len(stalls), "p50_ms": p50, "p99_ms": p99, "longest_ms": max(stalls)}


def print_stalls(rows: dict[str, dict[str, float]]) -> None:
    """Single flips beside moments without one."""
    print(f"{'gap beyond those around, ms':<28}{'p50':>10}{'p99':>10}{'longest':>10}{'gaps':>8}")
    for name, row in rows.items():
        cells = "".join(f"{row.get(column, nan):>10.2f}" for column in COLUMNS)
        print(f"{name:<28}{cells}{row['count']:>8}")


def stall_of_longest(calm_ms: Sequence[float], moving_ms: Sequence[float]) -> dict[str, float]:
    """What migrations add to the longest gap, milliseconds, from that of each round's phases."""
    added = [moving - calm for calm, moving in zip(calm_ms, moving_ms, strict=True)]
    return {
        "longest_gap_calm_ms": max(calm_ms),
        "longest_gap_moving_ms": max(moving_ms),
        "added_ms": max(moving_ms) - max(calm_ms),
        "added_in_a_round_longest_ms": max(added),
        "added_in_a_round_median_ms": median(added),
        "noise_ms": max(calm_ms) - min(calm_ms),
    }


def verdict(stall: dict[str, float], aim_ms: float) -> str:
    """Whether the aim is met; undecided where calm rounds differ by more than what is judged."""
    added_ms = stall["added_ms"]
    if abs(added_ms - aim_ms) <= stall["noise_ms"]:
        return f"undecided: the longest gaps of calm rounds lie {stall['noise_ms']:.2f} ms apart"
    return "met" if added_ms < aim_ms else "missed"


def print_longest(stall: dict[str, float], aim_ms: float) -> None:
    """The longest gaps beside each other, and their differences."""
    print(
        f"longest gap: {stall['longest_gap_moving_ms']:.2f} ms while experts move, "
        f"{stall['longest_gap_calm_ms']:.2f} ms while none does"
    )
    print(
        f"stall by migration: {stall['added_ms']:.2f} ms (aim < {aim_ms:g} ms "
        f"{verdict(stall, aim_ms)}); by rounds "
        f"{stall['added_in_a_round_median_ms']:.2f} ms at the median, "
        f"{stall['added_in_a_round_longest_ms']:.2f} ms at most"
    )
