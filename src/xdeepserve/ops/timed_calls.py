"""TimedCalls: counts the calls of an object's methods and their time. For measuring operators."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class CallTimes:
    """Of one method: calls, and nanoseconds inside them."""

    count: int = 0
    total_ns: int = 0


class TimedCalls:
    """Stands before `target`: attributes are the target's; methods are counted as they pass.

    Attributes:
        times: by method name, since the last `clear`.
    """

    def __init__(self, target: object) -> None:
        self._target = target
        self.times: dict[str, CallTimes] = {}

    def clear(self) -> None:
        """Count from zero again."""
        for times in self.times.values():
            times.count = times.total_ns = 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        if not callable(found):
            return found
        timed = self._timed(name, found)
        setattr(self, name, timed)  # the next call comes here no more
        return timed

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        times = self.times.setdefault(name, CallTimes())
        clock = time.perf_counter_ns

        def call(*args: Any) -> Any:
            begun_ns = clock()
            result = method(*args)
            times.total_ns += clock() - begun_ns
            times.count += 1
            return result

        return call
