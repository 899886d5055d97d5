"""Logging of every process to stderr, as text or as one JSON object a line.

XDEEPSERVE_LOG_LEVEL and XDEEPSERVE_LOG_FORMAT choose; processes that are started inherit both.
Nothing that a client wrote (prompts, keys) is logged; `HIDDEN` keeps it out of extra fields too.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from datetime import UTC, datetime
from typing import Final

from xdeepserve import envs

MAX_CHARS: Final = 16 << 10
"""Of a message, an extra field and a traceback; the rest is cut off."""

HIDDEN: Final = frozenset(
    {
        *("prompt", "prompts", "prompt_token_ids", "messages", "text", "body", "headers"),
        *("api_key", "authorization", "password", "secret"),
        "color_message",  # uvicorn's message once more, for terminals
    }
)
"""Names of extra fields that are left out."""

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
"""Attributes that every record has; others were passed as `extra`."""


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON.

    Fields: ts (RFC 3339, UTC), level, process (title; absent without one), pid, run_id (absent
    where there is no run), logger, message, exception (traceback, where there is one), and the
    record's extra fields. Extra fields never replace these.
    """

    def __init__(self, process: str, run_id: str) -> None:
        super().__init__()
        self._origin = {"process": process, "run_id": run_id}

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields: dict[str, object] = {
            "ts": _timestamp(record.created),
            "level": record.levelname.lower(),
            **{name: value for name, value in self._origin.items() if value},
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage()[:MAX_CHARS],
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)[-MAX_CHARS:]
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in HIDDEN:
                fields.setdefault(name, _plain(value))
        return json.dumps(fields)


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Ours, so that it can be told from those of a program that embeds us."""


def setup_logging(process: str = "", *, run_id: str = "") -> None:
    """Log to stderr from now on; replaces what an earlier call set up.

    Args:
        process: title, when the service is made of several processes.
        run_id: of the run that the process belongs to, where there is one.

    Raises:
        ConfigError: an environment variable has a wrong value.
    """
    handler = _StderrHandler(sys.stderr)
    if envs.LOG_FORMAT.get() == "json":
        handler.setFormatter(JsonFormatter(process, run_id))
    else:
        name = f" {process}" if process else ""
        handler.setFormatter(
            logging.Formatter(f"%(asctime)s{name} %(levelname)s %(name)s: %(message)s")
        )
    root = logging.getLogger()
    for former in [each for each in root.handlers if isinstance(each, _StderrHandler)]:
        root.removeHandler(former)
    # Does nothing where a program that embeds us has set up its own logging.
    logging.basicConfig(level=envs.LOG_LEVEL.get().upper(), handlers=[handler])
    # uvicorn announces its own start and stop at INFO; ours says more.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def _plain(value: object) -> object:
    """Numbers and truth values as they are, all else as text."""
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    return str(value)[:MAX_CHARS]
