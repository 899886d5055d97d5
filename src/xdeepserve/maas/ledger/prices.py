"""The price table: what a token costs, by model, tier and kind of token. A YAML file.

```yaml
version: "2026-11"
models:
  smollm2-135m: {default: {input: 20_000, cached_input: 4_000, output: 80_000}}
  "*":          {default: {input: 100_000, output: 400_000}}
```

Prices are whole micro-units of the currency for a million tokens; `*` is any other model. Cached
input costs what input does where no price is given. Without a table tokens are counted and free.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from xdeepserve.errors import ConfigError, NotFoundError

PER_TOKENS: Final = 1_000_000
MAX_PRICE: Final = 10**12
"""A unit of the currency for each token; keeps every sum far inside 64 bits."""

ANY_MODEL: Final = "*"
MAX_FILE_BYTES: Final = 1 << 20


class TokenCounts(msgspec.Struct, frozen=True):
    """What a request used; cached tokens are prompt tokens, too."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a million tokens, in micro-units."""

    input: int
    output: int
    cached_input: int | None = None

    def cost(self, counts: TokenCounts) -> int:
        """Micro-units, rounded to the nearest, halves up."""
        cached = self.input if self.cached_input is None else self.cached_input
        total = (counts.prompt - counts.cached) * self.input
        total += counts.cached * cached + counts.completion * self.output
        return (2 * total + PER_TOKENS) // (2 * PER_TOKENS)

    def most(self, prompt: int, completion: int) -> int:
        """The cost of a request of so many tokens, whatever of it is cached; micro-units."""
        cached = self.cached_input or 0
        return max(
            self.cost(TokenCounts(prompt, 0, completion)),
            self.cost(TokenCounts(prompt, prompt, completion)) if cached > self.input else 0,
        )


FREE: Final = Price(input=0, output=0, cached_input=0)


class PriceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Prices as of one version.

    Attributes:
        version: goes into every charge.
        models: model name or `*` -> tier -> price.
    """

    version: str
    models: dict[str, dict[str, Price]]

    def price(self, model: str, tier: str) -> Price:
        """Of one model and tier.

        Raises:
            NotFoundError: it is not sold.
        """
        tiers = self.models.get(model) or self.models.get(ANY_MODEL) or {}
        if tier not in tiers:
            raise NotFoundError(
                f"the model {model!r} is not sold in the tier {tier!r}; sold here: "
                f"{', '.join(tiers) or 'nothing'}",
                code="tier_not_available",
                param="service_tier",
            )
        return tiers[tier]


class FreePrices:
    """Stands in for a table where there is none."""

    version: Final = "free"

    def price(self, model: str, tier: str) -> Price:
        """Nothing, whatever the model and tier."""
        return FREE


def load_prices(path: Path) -> PriceTable:
    """Read a price table.

    Raises:
        ConfigError: not a file, not YAML, or not a table of prices within 0 and MAX_PRICE.
    """
    try:
        with path.open("rb") as file:
            raw: Any = yaml.safe_load(file.read(MAX_FILE_BYTES))
        table = msgspec.convert(raw, PriceTable)
    except (OSError, yaml.YAMLError, msgspec.ValidationError, RecursionError) as exc:
        raise ConfigError(f"price table {path}: {exc}") from exc
    for model, tiers in table.models.items():
        for tier, price in tiers.items():
            for value in (price.input, price.output, price.cached_input or 0):
                if not 0 <= value <= MAX_PRICE:
                    raise ConfigError(
                        f"price table {path}: {model}, {tier}: {value} must be between 0 and "
                        f"{MAX_PRICE} micro-units for a million tokens"
                    )
    return table
