"""Through the HTTP edge: one row per accepted request, with the counts that its reply shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette

from tests.databases import opened
from tests.unit.maas.asgi import MODEL, Call, call, events
from tests.unit.maas.ledger.orders import assert_books_balance, rows
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.config import GatewayConfig
from xdeepserve.errors import CapacityError
from xdeepserve.maas.access import Access
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.authenticator import Authenticator
from xdeepserve.maas.app import create_app
from xdeepserve.maas.ledger.billing import Billing
from xdeepserve.maas.ledger.budgets import Budgets
from xdeepserve.maas.ledger.meter import MeterFile
from xdeepserve.maas.ledger.prices import Price, PriceTable
from xdeepserve.maas.ledger.writer import LedgerWriter
from xdeepserve.maas.storage.database import Database
from xdeepserve.maas.storage.tables import CHARGES, RESERVATIONS
from xdeepserve.messages import TokenOutput

PRICE = Price(input=3_000_000, output=5_000_000, cached_input=1_000_000)
TABLE = PriceTable(version="v1", models={MODEL: {"default": PRICE}})
BODY = {"model": MODEL, "prompt": "abcde", "max_tokens": 16}


class Shop:
    """A service with keys, prices and a ledger over a replaying engine."""

    def __init__(self, app: Starlette, database: Database, meters: MeterFile, engine: ReplayEngine):
        self.app = app
        self.database = database
        self.meters = meters
        self.engine = engine
        self.headers = {"authorization": f"Bearer {self.new_key('a')}"}

    def new_key(self, tenant: str) -> str:
        accounts = Accounts(self.database)
        accounts.create_tenant(tenant)
        return accounts.create_key(tenant, "k").secret

    async def post(self, body: Any = None, **changes: Any) -> Call:
        body = BODY | changes if body is None else body
        return await call(self.app, "/v1/completions", body, headers=self.headers)

    async def charges(self) -> list[dict[str, Any]]:
        """When all that is over is settled."""
        async with asyncio.timeout(20):
            while self.meters.num_open:
                await asyncio.sleep(0.005)
        assert rows(self.database, RESERVATIONS) == []
        assert_books_balance(self.database)
        return rows(self.database, CHARGES)


@asynccontextmanager
async def opened_shop(
    tmp_path: Path, *scripts: Sequence[TokenOutput], num_cached_tokens: int = 0
) -> AsyncIterator[Shop]:
    engine = ReplayEngine(*scripts or (steps_of("hello"),), num_cached_tokens=num_cached_tokens)
    with opened(f"sqlite:///{tmp_path / 'service.db'}") as database:
        meters = MeterFile(tmp_path / "meters" / "a.meter")
        writer = LedgerWriter(database, meters, tmp_path / "meters")
        app = create_app(
            engine,
            byte_tokenizer(chat_template=None),
            GatewayConfig(),
            model_names=[MODEL],
            access=Access(Authenticator(database), Billing(writer, meters, TABLE, database)),
        )
        try:
            yield Shop(app, database, meters, engine)
        finally:
            writer.close(20)
            meters.close()


async def test_the_row_says_what_the_reply_says(tmp_path: Path) -> None:
    async with opened_shop(tmp_path, num_cached_tokens=2) as shop:
        done = await shop.post()
        usage = done.json()["usage"]
        (charge,) = await shop.charges()
        assert charge["request_id"] == done.json()["id"]
        assert charge["prompt_tokens"] == usage["prompt_tokens"] == 5
        assert charge["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] == 2
        assert charge["completion_tokens"] == usage["completion_tokens"] > 0
        assert charge["charge_micro"] == 3 * 3 + 2 * 1 + 5 * usage["completion_tokens"]
        assert (charge["finish_reason"], charge["model"], charge["tier_served"]) == (
            "stop",
            MODEL,
            "default",
        )


async def test_a_stream_costs_the_same(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        await shop.post()
        done = await shop.post(stream=True, stream_options={"include_usage": True})
        usage = events(done.body)[-2]["usage"]
        first, second = await shop.charges()
        assert second["completion_tokens"] == usage["completion_tokens"]
        assert first["charge_micro"] == second["charge_micro"] > 0


async def test_prompts_count_once_and_choices_each(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        done = await shop.post(prompt=["abc", "de"], n=3)
        (charge,) = await shop.charges()
        assert charge["prompt_tokens"] == done.json()["usage"]["prompt_tokens"] == 5
        assert charge["completion_tokens"] == done.json()["usage"]["completion_tokens"]


async def test_tokens_after_a_stop_string_are_free(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        done = await shop.post(stop="l")
        assert done.json()["choices"][0]["text"] == "he"
        (charge,) = await shop.charges()
        assert charge["completion_tokens"] == done.json()["usage"]["completion_tokens"]


async def test_who_leaves_pays_for_what_came(tmp_path: Path) -> None:
    async with opened_shop(tmp_path, steps_of("x" * 500)) as shop:
        calling = Call(shop.app, "/v1/completions", BODY | {"stream": True}, headers=shop.headers)
        await calling.first_body.wait()
        shop.engine.gate.clear()
        await asyncio.sleep(0.02)
        calling.disconnect()
        await calling.task
        (charge,) = await shop.charges()
        assert charge["finish_reason"] == "abort"
        assert charge["prompt_tokens"] == 5
        assert 1 <= charge["completion_tokens"] < 500


async def test_who_leaves_before_anything_came_has_a_row_that_costs_nothing(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        shop.engine.gate.clear()
        calling = Call(shop.app, "/v1/completions", BODY, headers=shop.headers)
        async with asyncio.timeout(20):
            while not shop.engine.requests:
                await asyncio.sleep(0.005)
        calling.disconnect()
        await calling.task
        (charge,) = await shop.charges()
        assert (charge["finish_reason"], charge["charge_micro"]) == ("abort", 0)


async def test_what_the_engine_refuses_has_no_row(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        shop.engine.error = CapacityError("full")
        assert (await shop.post()).status == 503
        assert await shop.charges() == []


async def test_bad_requests_are_not_billed(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        assert (await shop.post(temperature=9)).status == 400
        assert (await shop.post(model="other")).status == 404
        assert await shop.charges() == []
        assert shop.engine.requests == []


async def test_money_that_is_not_there(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        Budgets(shop.database).add_credit("a", PRICE.most(5, 16))
        assert (await shop.post()).status == 200
        (charge,) = await shop.charges()
        assert charge["charge_micro"] > 0
        done = await shop.post()
        assert done.status == 402
        assert done.json()["error"]["code"] == "insufficient_quota"
        assert done.headers["x-should-retry"] == "false"
        assert "retry-after" not in done.headers
        assert len(await shop.charges()) == 1
        assert len(shop.engine.requests) == 1


async def test_two_gateways_never_overspend(tmp_path: Path) -> None:
    async with opened_shop(tmp_path / "1") as shop, opened_shop(tmp_path / "2") as other:
        budget = 10 * PRICE.most(5, 16)
        Budgets(shop.database).add_credit("a", budget)
        folder = tmp_path / "third"
        meters = MeterFile(folder / "b.meter")
        writer = LedgerWriter(shop.database, meters, folder)
        app = create_app(
            other.engine,
            byte_tokenizer(chat_template=None),
            GatewayConfig(),
            model_names=[MODEL],
            access=Access(
                Authenticator(shop.database), Billing(writer, meters, TABLE, shop.database)
            ),
        )
        calls = [
            call(each, "/v1/completions", BODY, headers=shop.headers)
            for _ in range(32)
            for each in (shop.app, app)
        ]
        statuses = [done.status for done in await asyncio.gather(*calls)]
        async with asyncio.timeout(20):
            while meters.num_open:
                await asyncio.sleep(0.005)
        found = await shop.charges()
        writer.close(20)
        meters.close()
        assert set(statuses) == {200, 402}
        assert statuses.count(200) == len(found) >= 10
        assert sum(charge["charge_micro"] for charge in found) <= budget


async def test_usage_is_the_sum_of_the_rows(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        for _ in range(3):
            await shop.post()
        found = await shop.charges()
        other = {"authorization": f"Bearer {shop.new_key('b')}"}

        async def usage(query: str, headers: dict[str, str] = shop.headers) -> Call:
            return await call(shop.app, "/v1/usage", method="GET", headers=headers, query=query)

        (row,) = (await usage("")).json()["data"]
        assert row["num_requests"] == 3
        assert row["charge_micro"] == sum(charge["charge_micro"] for charge in found)
        assert row["day_us"] == found[0]["accepted_us"] // 86_400_000_000 * 86_400_000_000
        (row,) = (await usage("group_by=key,model,tier")).json()["data"]
        assert (row["key"], row["model"], row["tier"]) == (found[0]["key_id"], MODEL, "default")
        text = (await usage("group_by=model&format=csv")).body.decode()
        assert text.splitlines()[0].startswith("model,num_requests,prompt_tokens")
        assert text.splitlines()[1].startswith(f"{MODEL},3,15,")
        assert (await usage("", other)).json()["data"] == []
        assert (await usage("start_time=0&end_time=86400")).json()["data"] == []
        for bad in ("group_by=x", "group_by=day,day", "start_time=x", "format=xml", "end_time=0"):
            assert (await usage(bad)).status == 400, bad


async def test_what_ends_half_way_is_charged(tmp_path: Path) -> None:
    async with opened_shop(tmp_path) as shop:
        calling = Call(shop.app, "/v1/completions", BODY | {"stream": True}, headers=shop.headers)
        await calling.first_body.wait()
        shop.engine.gate.clear()
        shop.app.state.gateway.abort_running()
        await calling.task
        assert "error" in events(calling.body)[-1]
        (charge,) = await shop.charges()
        assert charge["finish_reason"] in ("abort", "stop")
        assert charge["prompt_tokens"] == 5
