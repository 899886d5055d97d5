"""`xdeepserve xccl trace`: the latest transfers between the ranks of a running service."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict

import msgspec

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.errors import ConfigError
from xdeepserve.xccl import Transfer, list_segments, read_transfers

COLUMNS = (
    *("RANK", "PEER", "KIND", "STATE", "BYTES", "REPLY", "SEQ"),
    *("EPOCH", "STEP", "LAYER", "MB", "STARTED", "DURATION"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-id", metavar="ID", help="which run, where several run here")
    parser.add_argument("--rank", type=int, metavar="R", help="only what rank R sent or received")
    parser.add_argument("--last", type=int, default=50, metavar="N", help="so many at most (50)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the latest transfers, the youngest last."""
    if args.last < 1:
        raise ConfigError(f"--last {args.last} must be at least 1")
    run_id = args.run_id or only_run()
    transfers = read_transfers(run_id)
    if args.rank is not None:
        transfers = [t for t in transfers if args.rank in (t.rank, t.peer)]
    now_s, now_ns = SYSTEM_CLOCK.wall(), int(SYSTEM_CLOCK.monotonic() * 1e9)
    latest = transfers[-args.last :]
    if args.json:
        lines = json_lines(latest, now_s, now_ns)
    else:
        names = " ".join(f"{i.rank}={i.name}" for i in list_segments(run_id) if i.rank >= 0)
        lines = [f"run {run_id}  ranks: {names}", *table(latest, now_ns)]
    print("\n".join(lines))
    return 0


def only_run() -> str:
    """The run that has living ranks.

    Raises:
        ConfigError: there is none, or there are several.
    """
    runs = sorted({info.run_id for info in list_segments() if info.is_running})
    if len(runs) != 1:
        found = ", ".join(runs) or "none"
        raise ConfigError(f"runs with segments in /dev/shm: {found}; name one with --run-id")
    return runs[0]


def json_lines(transfers: Sequence[Transfer], now_s: float, now_ns: int) -> list[str]:
    """Each transfer as JSON: start in Unix seconds, duration in microseconds, null if unknown."""
    lines = []
    for transfer in transfers:
        record = asdict(transfer)
        start_ns, duration_ns = record.pop("start_ns"), record.pop("duration_ns")
        record["start_s"] = None if start_ns is None else now_s - (now_ns - start_ns) * 1e-9
        record["duration_us"] = None if duration_ns is None else duration_ns * 1e-3
        lines.append(msgspec.json.encode(record).decode())
    return lines


def table(transfers: Sequence[Transfer], now_ns: int) -> list[str]:
    """The lines of the table, with its head."""
    rows = [COLUMNS, *(_row(transfer, now_ns) for transfer in transfers)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(transfer: Transfer, now_ns: int) -> tuple[str, ...]:
    t = transfer
    counts = (t.num_bytes, t.reply_bytes, t.sequence)
    names = (t.epoch, t.step_idx, t.layer_idx, t.microbatch_idx)
    started = "-" if t.start_ns is None else f"{(now_ns - t.start_ns) * 1e-9:.3f}s ago"
    duration = "-" if t.duration_ns is None else f"{t.duration_ns * 1e-3:.1f}us"
    return (
        *(str(t.rank), str(t.peer), t.kind.value, t.state),
        *map(str, counts),
        *("-" if name is None else str(name) for name in names),
        *(started, duration),
    )
