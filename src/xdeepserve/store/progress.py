"""terminal_progress: one line that shows how far a pull, build or packing is. Terminals only."""

from __future__ import annotations

from typing import Final, TextIO

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.models.files.source_digest import Progress

_MIN_INTERVAL_S: Final = 0.1
_BAR_WIDTH: Final = 30
_STAGES: Final = {
    "download": "downloading",
    "write": "writing",
    "hash": "hashing",
    "pack": "packing",
}


def terminal_progress(stream: TextIO, *, clock: Clock = SYSTEM_CLOCK) -> Progress | None:
    """A Progress that redraws one line on `stream`; None when `stream` is not a terminal."""
    if not stream.isatty():
        return None
    drawn_s = -1.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal drawn_s
        now_s = clock.monotonic()
        if done < total and drawn_s >= 0 and now_s - drawn_s < _MIN_INTERVAL_S:
            return
        drawn_s = now_s
        end = "\n" if done >= total else ""
        stream.write(f"\r{progress_line(stage, done, total)}{end}")
        stream.flush()

    return show


def progress_line(stage: str, done: int, total: int) -> str:
    """For example `packing     [##########..........]  50%  135.0/270.0 MB`."""
    share = min(1.0, done / total) if total > 0 else 1.0
    filled = int(share * _BAR_WIDTH)
    bar = "#" * filled + "." * (_BAR_WIDTH - filled)
    sizes = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB"
    return f"{_STAGES.get(stage, stage):<12}[{bar}] {share:4.0%}  {sizes}"
