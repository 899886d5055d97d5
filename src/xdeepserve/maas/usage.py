"""GET /v1/usage: what the caller's project has used, and what it cost."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from xdeepserve.errors import RequestError
from xdeepserve.maas.accounts.caller import caller_of
from xdeepserve.maas.gateway import gateway_of
from xdeepserve.maas.ledger.usage_row import DAY_US, UsageQuery, UsageRow

DEFAULT_DAYS = 30
MAX_DIGITS = 12


class UsageList(msgspec.Struct, kw_only=True):
    """Rows in ascending order of their groups."""

    object: str = "list"
    data: Sequence[UsageRow]


async def get_usage(request: Request) -> Response:
    """Sums by `group_by` (default: day) from `start_time` to `end_time` (Unix seconds)."""
    gateway = gateway_of(request)
    query = query_of(request.query_params, now_us=int(gateway.clock.wall() * 1e6))
    caller = caller_of(request)
    rows = await gateway.billing.usage(
        query, tenant_id=caller.tenant_id, project_id=caller.project_id
    )
    return reply(rows, query)


def reply(rows: Sequence[UsageRow], query: UsageQuery) -> Response:
    """Rows in the format that was asked for."""
    if query.format == "csv":
        return Response(to_csv(rows, query.groups), media_type="text/csv; charset=utf-8")
    return Response(msgspec.json.encode(UsageList(data=rows)), media_type="application/json")


def query_of(params: QueryParams, *, now_us: int) -> UsageQuery:
    """The query of a URL; by default the last 30 days, day by day.

    Raises:
        RequestError: a parameter is not what it should be; it is named.
    """
    to_us = _time_us(params, "end_time", now_us + 1)
    query = UsageQuery(
        from_us=_time_us(params, "start_time", max(0, to_us - DEFAULT_DAYS * DAY_US)),
        to_us=to_us,
        groups=tuple(name for name in params.get("group_by", "day").split(",") if name),
        format=params.get("format", "json"),
    )
    query.check()
    return query


def to_csv(rows: Sequence[UsageRow], groups: Sequence[str]) -> str:
    """With a line of names; groups first."""
    names = ["day_us" if name == "day" else name for name in groups]
    names += UsageRow.__struct_fields__[-5:]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in rows)
    return out.getvalue()


def _time_us(params: QueryParams, name: str, default: int) -> int:
    text = params.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise RequestError(f"{name}={text[:50]!r} must be whole Unix seconds", param=name)
    return int(text) * 1_000_000
