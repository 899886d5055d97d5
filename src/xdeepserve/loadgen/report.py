"""Result records: the table people read and the one-line JSON document programs read.

Also the fingerprint of the machine, which every result carries: a number without its machine is
no measurement.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from xdeepserve import __version__
from xdeepserve.loadgen.metrics import BenchMetrics, Summary

_ISA_FLAGS: Final = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_int8", "asimd", "sve")
_LABEL_WIDTH: Final = 30
MAX_LAG_MS: Final = 20.0
"""Lateness (p99) of an open-loop client beyond which its latencies are its own."""


def machine_fingerprint() -> dict[str, Any]:
    """CPU, usable cores, memory, system, versions, commit (None outside a git tree), UTC time."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "isa": _isa_flags(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "xdeepserve": __version__,
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(key: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _isa_flags() -> list[str]:
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [flag for flag in _ISA_FLAGS if flag in flags]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _commit() -> str | None:
    """Commit of the source tree this package runs from, `+` appended when it has changes."""
    here = str(Path(__file__).resolve().parent)
    git = ["git", "-C", here]
    try:
        done = [
            subprocess.run([*git, *args], capture_output=True, text=True, timeout=5, check=True)
            for args in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", here))
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return done[0].stdout.strip() + ("+" if done[1].stdout.strip() else "")


def json_line(document: Mapping[str, Any]) -> str:
    """`document` as one line of JSON; dataclasses allowed, NaN becomes null."""
    return msgspec.json.encode(document).decode()


def print_metrics(metrics: BenchMetrics) -> None:
    """The table for people, on stdout."""
    for label, value in _rows(metrics):
        print(f"{label:<{_LABEL_WIDTH}}{value}")
    _print_latencies(metrics)
    for message, count in metrics.errors.items():
        print(f"failed {count} x: {message}")


def _rows(metrics: BenchMetrics) -> list[tuple[str, str]]:
    rows = [
        ("requests completed", str(metrics.num_completed)),
        ("requests failed", str(metrics.num_failed)),
        ("duration (s)", f"{metrics.duration_s:.2f}"),
        ("prompt tokens", f"{metrics.num_prompt_tokens} ({metrics.num_cached_tokens} cached)"),
        ("output tokens", f"{metrics.num_output_tokens} (counted by {metrics.counted_by})"),
        ("requests/s", f"{metrics.requests_per_s:.2f}"),
        ("output tokens/s", f"{metrics.output_tokens_per_s:.1f}"),
        ("total tokens/s", f"{metrics.total_tokens_per_s:.1f}"),
    ]
    if metrics.goodput is not None:
        limits = ", ".join(f"{name} <= {ms:g} ms" for name, ms in metrics.goodput.slo_ms.items())
        share = f"{metrics.goodput.share:.0%} of requests"
        rows.append((f"goodput ({limits})", f" {metrics.goodput.requests_per_s:.2f}/s, {share}"))
    if metrics.num_wrong_length:
        rows.append(("answers of another length", str(metrics.num_wrong_length)))
    return rows


def _print_latencies(metrics: BenchMetrics) -> None:
    print(f"{'milliseconds':<14}" + "".join(f"{name:>10}" for name in Summary.__slots__))
    table = {
        "TTFT": metrics.ttft_ms,
        "TPOT": metrics.tpot_ms,
        "ITL": metrics.itl_ms,
        "E2E": metrics.e2e_ms,
    }
    for name, summary in table.items():
        print(f"{name:<14}" + "".join(f"{text:>10}" for text in _summary_cells(summary)))


def _summary_cells(summary: Summary | None) -> list[str]:
    if summary is None:
        return ["-"] * len(Summary.__slots__)
    return [f"{getattr(summary, name):.1f}" for name in Summary.__slots__]


class ProgressBar:
    """A bar on stderr when that is a terminal, nothing otherwise."""

    _WIDTH: Final = 30

    def __init__(self, total: int | None, label: str) -> None:
        self._total = total
        self._label = label
        self._num_done = 0
        self._num_failed = 0
        self._is_shown = sys.stderr.isatty()

    def advance(self, *, is_failed: bool) -> None:
        """Count one finished request and redraw."""
        self._num_done += 1
        self._num_failed += is_failed
        if self._is_shown:
            sys.stderr.write(f"\r\x1b[K{self._label} {self._bar()}{self._failures()}")
            sys.stderr.flush()

    def _bar(self) -> str:
        if self._total is None:
            return str(self._num_done)
        filled = self._WIDTH * self._num_done // max(1, self._total)
        return f"[{'#' * filled:<{self._WIDTH}}] {self._num_done}/{self._total}"

    def _failures(self) -> str:
        return f", {self._num_failed} failed" if self._num_failed else ""

    def close(self) -> None:
        """Wipe the bar."""
        if self._is_shown and self._num_done:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def warnings_for(metrics: BenchMetrics, *, shared_prefix: bool) -> Sequence[str]:
    """What a reader must know before trusting the numbers."""
    notes: list[str] = []
    if metrics.counted_by != "usage":
        notes.append("no usage for some answers: their chunks were counted as tokens")
    if metrics.num_wrong_length:
        notes.append("some answers have another length than asked for: does it know ignore_eos?")
    if not shared_prefix and metrics.num_cached_tokens * 20 > metrics.num_prompt_tokens > 0:
        notes.append("over 5% of the prompt tokens came from the prefix cache: use another --seed")
    if metrics.lag_ms_p99 > MAX_LAG_MS:
        notes.append(f"the client was busy: it sent requests {metrics.lag_ms_p99:.0f} ms late")
    return notes
