"""StageTimes: where the time of a step goes, so that a straggler can be named.

Plain counters that one thread adds to and others read; a reading may miss the sample under way.
"""

from __future__ import annotations

import time
from enum import StrEnum


class Stage(StrEnum):
    """Stages of an attention worker's step, and of a module worker's loop."""

    SCHEDULE = "schedule"
    """Taking requests in, and deciding what the step computes."""
    INPUTS = "inputs"
    """Making arrays of the plan."""
    LAYERS = "layers"
    """Embedding and all layers as one operator, where FFNs and experts are of this process."""
    ATTENTION = "attention"
    """Embedding, norms, attention, router: everything between two exchanges."""
    HEAD = "head"
    """Final norm and LM head."""
    DRAFT = "draft"
    """The MTP layer: its cache, and drafts for the next step."""
    SAMPLE = "sample"
    """Choosing tokens; log probabilities."""
    UPDATE = "update"
    """Counting the new tokens, publishing full blocks, ending requests."""
    DISPATCH = "dispatch"
    """Planning and copying rows for others."""
    OWN_MODULES = "own_modules"
    """FFNs and experts that this process computes itself."""
    WAIT = "wait"
    """Waiting for answers: others compute."""
    COMBINE = "combine"
    """Adding answers up."""
    POLL = "poll"
    """A module worker waits for requests."""
    FFN = "ffn"
    EXPERT = "expert"


class StageTimer:
    """`with timer:` counts the time of the block. Cheap enough for every layer."""

    __slots__ = ("_begun_ns", "count", "total_ns")

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0
        self._begun_ns = 0

    def __enter__(self) -> None:
        self._begun_ns = time.perf_counter_ns()

    def __exit__(self, *error: object) -> None:
        self.total_ns += time.perf_counter_ns() - self._begun_ns
        self.count += 1


class StageTimes:
    """Seconds and occurrences by stage, since the start."""

    def __init__(self) -> None:
        self._timers = {stage: StageTimer() for stage in Stage}

    def measure(self, stage: Stage) -> StageTimer:
        """The timer of a stage; one block of it at a time."""
        return self._timers[stage]

    def seconds(self) -> dict[Stage, float]:
        """Seconds by stage, of the stages that occurred."""
        return {stage: t.total_ns / 1e9 for stage, t in self._timers.items() if t.count}

    def counts(self) -> dict[Stage, int]:
        """Occurrences by stage, of those that occurred."""
        return {stage: t.count for stage, t in self._timers.items() if t.count}
