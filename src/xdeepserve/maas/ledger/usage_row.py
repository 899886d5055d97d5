"""A question about usage, and a row of its answer."""

from __future__ import annotations

from typing import Final

import msgspec

from xdeepserve.errors import RequestError

DAY_US: Final = 86_400_000_000
MAX_DAYS: Final = 366
GROUPS: Final = ("day", "tenant", "project", "key", "model", "tier")
FORMATS: Final = ("json", "csv")


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be summed up, how.

    Attributes:
        from_us: requests accepted from this time on (microseconds since the epoch),
        to_us: and before this one; at most MAX_DAYS later.
        groups: of GROUPS; none = one row for all.
        format: of FORMATS.
    """

    from_us: int
    to_us: int
    groups: tuple[str, ...] = ("day",)
    format: str = "json"

    def check(self) -> None:
        """Refuse what cannot be answered.

        Raises:
            RequestError: unknown group or format, or a bad range.
        """
        unknown = [name for name in self.groups if name not in GROUPS]
        if unknown or len(set(self.groups)) != len(self.groups):
            raise RequestError(
                f"group_by={','.join(self.groups)[:100]!r} must be some of {', '.join(GROUPS)}, "
                "each once",
                param="group_by",
            )
        if self.format not in FORMATS:
            raise RequestError(
                f"format={self.format[:50]!r} must be one of {', '.join(FORMATS)}", param="format"
            )
        if not 0 <= self.from_us < self.to_us <= self.from_us + MAX_DAYS * DAY_US:
            raise RequestError(
                f"start_time must be before end_time, by {MAX_DAYS} days at most",
                param="start_time",
            )


class UsageRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sums over some charges; a group that was not asked for is None.

    Attributes:
        day_us: the day's beginning, microseconds since the epoch, UTC; requests count on the day
            that they were accepted on.
        charge_micro: micro-units.
    """

    day_us: int | None = None
    tenant: str | None = None
    project: str | None = None
    key: str | None = None
    model: str | None = None
    tier: str | None = None
    num_requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    charge_micro: int
