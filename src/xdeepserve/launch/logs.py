"""Logging of every process: to stderr, at XDEEPSERVE_LOG_LEVEL, with the process's name."""

from __future__ import annotations

import logging
import sys

from xdeepserve import envs


def setup_logging(process: str = "") -> None:
    """Log to stderr; lines carry `process` when the service is made of several."""
    name = f" {process}" if process else ""
    logging.basicConfig(
        level=envs.LOG_LEVEL.get().upper(),
        format=f"%(asctime)s{name} %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # uvicorn announces its own start and stop at INFO; ours says more.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
