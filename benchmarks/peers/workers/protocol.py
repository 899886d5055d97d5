"""How a worker talks to the benchmark: one JSON object a line, orders on stdin, answers on stdout.

Standard library alone, because every worker runs in its engine's environment. What an engine
prints goes to stderr from when this module is imported, so import it before one that prints then.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def serve(start: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, float]]]) -> None:
    """Start an engine and obey orders until stdin ends.

    Args:
        start: takes the settings (sys.argv[1], JSON), loads the model and returns the function
            that runs an order.
    """

    def say(answer: dict[str, Any]) -> None:
        ANSWERS.write(json.dumps(answer) + "\n")
        ANSWERS.flush()

    run = start(json.loads(sys.argv[1]))
    say({"ready": True})
    for line in sys.stdin:
        try:
            say(run(json.loads(line)))
        except Exception as exc:  # loop top: an order that fails is a row of the table
            say({"error": f"{type(exc).__name__}: {exc}"})


def summary(
    start_s: float, first_s: list[float], last_s: list[float], output_len: int
) -> dict[str, float]:
    """The answer to an order: times of the first and the last token of each request.

    Args:
        start_s: when the order began, on the clock of the others.
        output_len: tokens of each request.
    """
    gaps = [last - first for first, last in zip(first_s, last_s, strict=True)]
    return {
        "seconds": max(last_s) - start_s,
        "ttft_s": sum(first_s) / len(first_s) - start_s,
        "tpot_s": sum(gaps) / len(gaps) / max(1, output_len - 1),
    }
