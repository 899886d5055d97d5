"""Clock protocol, so that tests own time. Production code uses `SYSTEM_CLOCK`."""

from __future__ import annotations

import time
from typing import Final, Protocol


class Clock(Protocol):
    """Monotonic and wall time in seconds."""

    def monotonic(self) -> float:
        """Seconds since an arbitrary start; never goes back; comparable in one process only."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch."""
        ...


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()


SYSTEM_CLOCK: Final = SystemClock()
