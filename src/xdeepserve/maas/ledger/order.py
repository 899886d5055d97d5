"""What is known of a request before it runs, and why its tenant may not have it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import msgspec

from xdeepserve.errors import XDeepServeError
from xdeepserve.maas.ledger.prices import Price

PREPAID: Final = "prepaid"
MONTHLY: Final = "monthly"


class QuotaError(XDeepServeError):
    """The tenant's money does not cover the request: 402 prepaid, 429 a budget of a month."""

    error_type = "insufficient_quota"

    def __init__(self, kind: str, needed: int, left: int) -> None:
        what = "balance" if kind == PREPAID else "budget of this month"
        super().__init__(
            f"the request may cost {needed} micro-units and the {what} has {max(left, 0)} left; "
            "add to it, or ask for fewer tokens (max_tokens)",
            code="insufficient_quota",
        )
        self.status = 402 if kind == PREPAID else 429


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is about to be accepted.

    Attributes:
        price: of its model and tier, from the table of that version.
        most_micro: the most that it can cost.
    """

    request_id: str
    tenant_id: str
    project_id: str
    key_id: str
    model: str
    tier_asked: str
    tier_served: str
    price: Price
    price_version: str
    most_micro: int
    accepted_us: int


def month_of(micros: int) -> str:
    """The month of a time, for example `2026-11`, in UTC."""
    return datetime.fromtimestamp(micros / 1e6, UTC).strftime("%Y-%m")
