"""A gateway is killed at every point of a request's way into the ledger; the books balance.

Many clients stream, a third of them leaves half way. After recovery there is exactly one row for
each request that was accepted, with the tokens that the engine had handed over, and no other row.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import pytest

from tests.databases import PostgresCluster, opened, postgres_cluster
from tests.faults.ledger_server import MODEL, POINTS, PRICES
from tests.unit.maas.ledger.orders import assert_books_balance, rows
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.ledger.budgets import Budgets
from xdeepserve.maas.ledger.meter import MeterFile, dead_files
from xdeepserve.maas.ledger.prices import TokenCounts
from xdeepserve.maas.ledger.writer import LedgerWriter
from xdeepserve.maas.storage.database import Database
from xdeepserve.maas.storage.tables import CHARGES, RESERVATIONS

NUM_CLIENTS = 50
TIMEOUT_S = 60.0
IDLE_S = 1.0
PRICE = PRICES.price(MODEL, "default")
WHENS = [f"{when} {place}" for place in POINTS for when in ("before", "after")]
COUNTDOWNS = {"record": 400, "claim": 30, "reserve": 30, "finish": 20}
"""How often a point is passed; the first time where nothing is said."""

CASES = [
    *(("sqlite", point) for point in WHENS),
    *(("postgresql", f"after {place}") for place in ("reserve", "record", "settle")),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgresCluster]:
    with postgres_cluster() as running:
        yield running


@contextmanager
def server(url: str, folder: Path, point: str, countdown: int) -> Iterator[str]:
    """Base URL of a gateway that will be killed."""
    program = [sys.executable, "-m", "tests.faults.ledger_server", url, str(folder), point]
    with subprocess.Popen(
        [*program, str(countdown)], stdout=subprocess.PIPE, text=True, env=os.environ
    ) as process:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        try:
            yield f"http://127.0.0.1:{port}"
            with suppress(subprocess.TimeoutExpired):
                process.wait(IDLE_S)  # it may have passed the point less often
        finally:
            process.kill()


async def listen(client: httpx2.AsyncClient, number: int, secret: str) -> dict[str, int]:
    """Stream one answer; every third client leaves early. Returns request id -> tokens seen."""
    seen: dict[str, int] = {}
    body = {"model": MODEL, "prompt": f"{number:04}", "max_tokens": 64, "stream": True}
    headers = {"authorization": f"Bearer {secret}"}
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as reply:
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                num_seen = seen.get(event["id"], 0)
                seen[event["id"]] = num_seen + any(choice["text"] for choice in event["choices"])
                if number % 3 == 0 and num_seen > number % 17:
                    break
    except httpx2.TransportError:
        pass  # the server was killed
    return seen


async def flood(base_url: str, secret: str) -> dict[str, int]:
    """Request id -> tokens that its client has seen, for all that were answered."""
    limits = httpx2.Limits(max_connections=NUM_CLIENTS)
    async with httpx2.AsyncClient(base_url=base_url, limits=limits, timeout=TIMEOUT_S) as client:
        streams = (listen(client, i, secret) for i in range(NUM_CLIENTS))
        return dict(ChainMap(*await asyncio.gather(*streams)))


def witnessed(folder: Path) -> dict[str, TokenCounts]:
    """Request id -> what the engine has made for it."""
    found = {}
    for meters in dead_files(folder / "witness"):
        found |= {left.request_id: left.counts for left in meters.left_over()}
        meters.close()
    return found


def recover(database: Database, folder: Path) -> None:
    """As the next gateway does."""
    meters = MeterFile(folder / "meters" / "next.meter")
    writer = LedgerWriter(database, meters, folder / "meters")
    deadline_s = time.monotonic() + TIMEOUT_S
    while len(list((folder / "meters").iterdir())) > 1:
        assert time.monotonic() < deadline_s, "the dead gateway's file is still there"
        time.sleep(0.02)
    writer.close(TIMEOUT_S)
    meters.close()


def check(database: Database, folder: Path, seen: dict[str, int]) -> None:
    made = witnessed(folder)
    charges = {row["request_id"]: row for row in rows(database, CHARGES)}
    assert rows(database, RESERVATIONS) == []
    assert_books_balance(database)
    assert set(seen) <= set(made) <= set(charges), "somebody was served who has no row"
    for request_id, num_seen in seen.items():
        assert charges[request_id]["completion_tokens"] >= num_seen
    for request_id, row in charges.items():
        counts = TokenCounts(row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"])
        assert row["charge_micro"] == PRICE.cost(counts)
        handed_over = made.get(request_id, TokenCounts()).completion
        assert handed_over - 1 <= counts.completion <= handed_over, row


@pytest.mark.parametrize(("kind", "point"), CASES)
async def test_killed(
    point: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"sqlite:///{tmp_path / 'service.db'}"
    if kind == "postgresql":
        cluster: PostgresCluster = request.getfixturevalue("cluster")
        url = cluster.new_database()
    with opened(url) as database:
        accounts = Accounts(database)
        accounts.create_tenant("a")
        secret = accounts.create_key("a", "k").secret
        Budgets(database).add_credit("a", 10**9)
        countdown = COUNTDOWNS.get(point.partition(" ")[2], 1)
        with server(url, tmp_path, point, countdown) as base_url:
            seen = await flood(base_url, secret)
        recover(database, tmp_path)
        check(database, tmp_path, seen)
