"""When Python looks for cyclic garbage: hardly ever while there is work, fully when there is none.

    start ---------> settle()         collect, freeze what lives as long as the process
    under load       young objects are looked through rarely, old ones as good as never
    idle for 1 s --> collect_idle()   everything that is not frozen

A collection holds the GIL, so it stops step loop and event loop of its process alike. Reference
counts free nearly all that a request leaves behind; cycles come from errors and from asyncio.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG_THRESHOLD: Final = 10_000
"""Containers made and not freed before the youngest are looked through: about a millisecond."""

OLD_THRESHOLD: Final = 100
"""Middle collections (of 10 young ones each) before a full one may happen under load: a bound on
what cycles can hold, for a process that is never idle."""


def settle() -> None:
    """Take what exists now for permanent. Call it when all that a process needs is made.

    Collections do not look at it any more, and forked children do not copy its pages.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_THRESHOLD, 10, OLD_THRESHOLD)


def collect_idle() -> None:
    """Collect all cyclic garbage, in a process that has settled; in another one do nothing."""
    if gc.get_freeze_count():
        gc.collect()
