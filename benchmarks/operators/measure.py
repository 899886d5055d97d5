"""Times one case: ours and every way of torch's take turns; medians of the repeats count."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import Final

from benchmarks.operators.case import Calls, Case
from benchmarks.operators.operands import Operands
from benchmarks.operators.registry import WITHOUT_TORCH
from benchmarks.operators.roofline import Roof, Work
from benchmarks.operators.torch_operands import TorchOperands

OURS: Final = "ours"
MAX_CALLS: Final = 20_000
"""Of one turn."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long to look.

    Attributes:
        repeats: turns of each side.
        turn_s: seconds of calls in one turn.
        pause_s: before a turn; the other side's threads spin a while before they sleep.
    """

    repeats: int = 5
    turn_s: float = 0.01
    pause_s: float = 0.002


@dataclass(frozen=True, slots=True)
class TorchTime:
    """The fastest way of torch's; `reason` says why there is none."""

    us: float | None = None
    way: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """One case, measured.

    Attributes:
        us: microseconds of a call from Python, median of the turns.
        us_fastest: of the fastest turn.
        rate: GB/s, or GFLOP/s (GOP/s) where `bound` is compute.
        bound: what would limit the call at best: memory, cache or compute.
        bound_us: how long it takes at that limit.
        share: bound_us / us.
        ratio: torch's time over ours, the median of the ratios of each turn.
        copies: operand sets that took turns.
    """

    model: str
    operator: str
    what: str
    dtype: str
    tokens: int | None
    context: int | None
    us: float
    us_fastest: float
    rate: float
    bound: str
    bound_us: float
    share: float
    torch: TorchTime
    ratio: float | None
    copies: int
    work: Work


class Side:
    """One side of a case: its calls, again and again, in their order. Thread: one."""

    def __init__(self, calls: Calls, timing: Timing) -> None:
        self._calls = cycle(calls)
        next(self._calls)()
        started = time.perf_counter()
        next(self._calls)()
        one_s = max(time.perf_counter() - started, 1e-7)
        self._count = max(1, min(MAX_CALLS, round(timing.turn_s / one_s)))
        self._pause_s = timing.pause_s
        self.seconds: list[float] = []

    def take_turn(self) -> None:
        """Time some calls, after one that wakes the threads; keeps the seconds of one."""
        time.sleep(self._pause_s)
        first, *calls = islice(self._calls, self._count + 1)
        gc.disable()
        try:
            first()
            started = time.perf_counter()
            for call in calls:
                call()
            self.seconds.append((time.perf_counter() - started) / self._count)
        finally:
            gc.enable()


def measure(
    model: str,
    case: Case,
    operands: Operands,
    torch: TorchOperands | None,
    roof: Roof,
    timing: Timing,
) -> Result:
    """Time one case; torch: None = it is not there."""
    prepared = case.prepare(operands)
    ways, reason = _torch_ways(case, torch)
    sides = {OURS: Side(prepared.calls, timing)}
    for way, calls in ways.items():
        try:
            sides[way] = Side(calls, timing)
        except RuntimeError as exc:  # a way that this build or machine lacks
            reason = _first_line(exc)
    for _ in range(timing.repeats):
        for side in sides.values():
            side.take_turn()
    seconds = {name: side.seconds for name, side in sides.items()}
    ours = seconds.pop(OURS)
    time_of_torch, ratio = _fastest(ours, seconds, reason)
    bound, bound_s = roof.bound_of(prepared.work)
    return Result(
        model=model,
        operator=case.operator,
        what=case.what,
        dtype=case.dtype,
        tokens=case.tokens,
        context=case.context,
        us=median(ours) * 1e6,
        us_fastest=min(ours) * 1e6,
        rate=prepared.work.amount(bound) / median(ours) / 1e9,
        bound=bound,
        bound_us=bound_s * 1e6,
        share=bound_s / median(ours),
        torch=time_of_torch,
        ratio=ratio,
        copies=len(prepared.calls),
        work=prepared.work,
    )


def _torch_ways(case: Case, torch: TorchOperands | None) -> tuple[dict[str, Calls], str]:
    """(calls of each way, why there are none)."""
    if torch is None:
        return {}, "no torch"
    without = WITHOUT_TORCH.get(case.operator, "")
    if case.torch is None:
        return {}, without
    try:
        return case.torch(torch), without
    except (AttributeError, RuntimeError) as exc:
        return {}, _first_line(exc)


def _first_line(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}".splitlines()[0]


def _fastest(
    ours: list[float], ways: Mapping[str, list[float]], reason: str
) -> tuple[TorchTime, float | None]:
    if not ways:
        return TorchTime(reason=reason), None
    way = min(ways, key=lambda name: median(ways[name]))
    ratios = [theirs / mine for theirs, mine in zip(ways[way], ours, strict=True)]
    return TorchTime(us=median(ways[way]) * 1e6, way=way), median(ratios)
