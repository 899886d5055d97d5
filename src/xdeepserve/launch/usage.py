"""`xdeepserve usage`: what was used and what it cost, from the ledger."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec

from xdeepserve.launch.accounts import opened_database
from xdeepserve.maas.accounts.accounts import find_tenant
from xdeepserve.maas.ledger.usage import usage
from xdeepserve.maas.ledger.usage_row import GROUPS, UsageQuery, UsageRow
from xdeepserve.maas.usage import to_csv


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenant", help="id or name (default: all)")
    parser.add_argument("--since", type=_day, metavar="DAY", help="2026-11-01 (default: 30 days)")
    parser.add_argument("--until", type=_day, metavar="DAY", help="the last day (default: today)")
    parser.add_argument(
        "--by", nargs="*", default=["day"], choices=GROUPS, help="groups (default: day)"
    )
    parser.add_argument(
        "--format", choices=("table", "csv", "json"), default="table", help="(default: table)"
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print one row per group."""
    today = datetime.fromtimestamp(time.time(), UTC).replace(hour=0, minute=0, second=0)
    until = args.until or today.replace(microsecond=0)
    since = args.since or until - timedelta(days=29)
    query = UsageQuery(
        from_us=_micros(since), to_us=_micros(until + timedelta(days=1)), groups=tuple(args.by)
    )
    query.check()
    with opened_database() as database:
        tenant_id = None
        if args.tenant is not None:
            with database.reading() as connection:
                tenant_id = find_tenant(connection, args.tenant).id
        rows = usage(database, query, tenant_id=tenant_id)
    print(render(rows, query.groups, args.format), end="")
    return 0


def render(rows: Sequence[UsageRow], groups: Sequence[str], style: str) -> str:
    """Rows as a table for people, CSV or JSON; ends with a newline."""
    if style == "json":
        return msgspec.json.encode(rows).decode() + "\n"
    if style == "csv":
        return to_csv(rows, groups)
    heads = [*groups, "requests", "prompt", "cached", "completion", "cost"]
    lines = [heads, *(_cells(row, groups) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.ljust(width) if i < len(groups) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    )


def _cells(row: UsageRow, groups: Sequence[str]) -> list[str]:
    counts = (row.num_requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens)
    cost = f"{Decimal(row.charge_micro) / 1_000_000:.6f}"
    return [*(_group(row, name) for name in groups), *map(str, counts), cost]


def _group(row: UsageRow, name: str) -> str:
    if name == "day":
        assert row.day_us is not None, "it was asked for"
        return datetime.fromtimestamp(row.day_us / 1e6, UTC).strftime("%Y-%m-%d")
    return str(getattr(row, name))


def _day(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a day like 2026-11-01") from None


def _micros(day: datetime) -> int:
    return int(day.timestamp()) * 1_000_000
