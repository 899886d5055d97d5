"""What the gateway knows of money: a charge that is opened before a request and closed after it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.maas.accounts.caller import Caller
from xdeepserve.maas.ledger.meter import Ending, Meter, MeterFile
from xdeepserve.maas.ledger.order import Order
from xdeepserve.maas.ledger.prices import Price, TokenCounts
from xdeepserve.maas.ledger.usage_row import UsageQuery, UsageRow

if TYPE_CHECKING:  # brings the database along, which an open service does without
    from xdeepserve.maas.ledger.writer import LedgerWriter
    from xdeepserve.maas.storage.database import Database

DEFAULT_TIER: Final = "default"


class Prices(Protocol):
    """What tokens cost; PriceTable or FreePrices."""

    @property
    def version(self) -> str: ...

    def price(self, model: str, tier: str) -> Price: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Purchase:
    """What a request may use at most.

    Attributes:
        num_prompt_tokens: of all its prompts.
        max_completion_tokens: of all its choices.
    """

    request_id: str
    caller: Caller
    model: str
    num_prompt_tokens: int
    max_completion_tokens: int
    tier: str = DEFAULT_TIER


class Charge:
    """A request that is being served. `record` as tokens come, `close` when no more will."""

    def __init__(self, meter: Meter, writer: LedgerWriter, clock: Clock) -> None:
        self._meter = meter
        self._writer = writer
        self._clock = clock

    def record(self, counts: TokenCounts) -> None:
        """Before these tokens are sent."""
        self._meter.record(counts)

    def close(self, ending: Ending) -> None:
        """Once. The charge is in the ledger a little later."""
        self._meter.finish(ending, int(self._clock.wall() * 1e6))
        self._writer.settle(self._meter.slot)


class Billing:
    """Opens charges, and says what was charged. Lives on the event loop."""

    def __init__(
        self,
        writer: LedgerWriter,
        meters: MeterFile,
        prices: Prices,
        database: Database,
        *,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._writer = writer
        self._meters = meters
        self._prices = prices
        self._database = database
        self._clock = clock

    async def open(self, purchase: Purchase) -> Charge:
        """Reserve the most that a request can cost.

        Raises:
            NotFoundError: its model is not sold in its tier.
            QuotaError: the tenant's budget does not cover it.
            CapacityError, DatabaseError: it cannot be billed now, so it must not run.
        """
        price = self._prices.price(purchase.model, purchase.tier)
        most = price.most(purchase.num_prompt_tokens, purchase.max_completion_tokens)
        caller = purchase.caller
        order = Order(
            request_id=purchase.request_id,
            tenant_id=caller.tenant_id,
            project_id=caller.project_id,
            key_id=caller.key_id,
            model=purchase.model,
            tier_asked=purchase.tier,
            tier_served=purchase.tier,
            price=price,
            price_version=self._prices.version,
            most_micro=most,
            accepted_us=int(self._clock.wall() * 1e6),
        )
        charge = Charge(self._meters.claim(purchase.request_id), self._writer, self._clock)
        is_reserved = False
        try:
            await self._writer.reserve(order)
            is_reserved = True
        finally:
            if not is_reserved:  # as far as we know; also when the client has left
                charge.close(Ending.REFUSED)
        return charge

    async def usage(
        self, query: UsageQuery, *, tenant_id: str | None = None, project_id: str | None = None
    ) -> list[UsageRow]:
        """What was charged; see `usage.usage`."""
        from xdeepserve.maas.ledger.usage import usage

        work = partial(usage, self._database, query, tenant_id=tenant_id, project_id=project_id)
        return await self._database.run(work)
