"""Prices: whole micro-units, the most is never less than the cost, a bad table is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdeepserve.errors import ConfigError, NotFoundError
from xdeepserve.maas.ledger.prices import FreePrices, Price, TokenCounts, load_prices

TABLE = """
version: "2026-11"
models:
  small:
    default: {input: 20_000, cached_input: 4_000, output: 80_000}
    flex: {input: 1, output: 2}
  "*": {default: {input: 100_000, output: 400_000}}
"""
micros = st.integers(0, 10**12)
tokens = st.integers(0, 10**6)


def test_a_table(tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text(TABLE)
    table = load_prices(tmp_path / "prices.yaml")
    assert table.version == "2026-11"
    assert table.price("small", "default") == Price(20_000, 80_000, 4_000)
    assert table.price("other", "default") == Price(100_000, 400_000)
    for model, tier in (("other", "flex"), ("small", "priority")):
        with pytest.raises(NotFoundError, match=tier):
            table.price(model, tier)
    assert FreePrices().price("any", "flex").cost(TokenCounts(5, 1, 7)) == 0


def test_costs_are_rounded_to_the_nearest() -> None:
    price = Price(input=100_000, output=400_000, cached_input=50_000)
    assert price.cost(TokenCounts(10, 0, 0)) == 1
    assert price.cost(TokenCounts(4, 0, 0)) == 0
    assert price.cost(TokenCounts(5, 0, 0)) == 1
    assert price.cost(TokenCounts(1_000_000, 400_000, 10)) == 60_000 + 20_000 + 4
    assert Price(100_000, 0).cost(TokenCounts(10, 10, 0)) == 1  # cached input costs as input


@given(micros, micros, st.none() | micros, tokens, tokens, tokens)
def test_the_most_is_not_exceeded(
    given_input: int, output: int, cached: int | None, prompt: int, hits: int, completion: int
) -> None:
    price = Price(given_input, output, cached)
    most = price.most(prompt, completion)
    for count in {0, completion // 2, completion}:
        assert 0 <= price.cost(TokenCounts(prompt, min(hits, prompt), count)) <= most


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a",
        "version: 1\nmodels: {}",
        "version: v\nmodels: {m: {default: {input: -1, output: 0}}}",
        "version: v\nmodels: {m: {default: {input: 0, output: 10_000_000_000_000}}}",
        "version: v\nmodels: {m: {default: {input: 1.5, output: 0}}}",
        "version: v\nmodels: {m: {default: {input: 1}}}",
        "version: v\nmodels: {m: {default: {input: 1, output: 1, extra: 2}}}",
        "version: v\nmodels: !!python/object/apply:os.system [ls]",
    ],
)
def test_bad_tables(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"prices\.yaml"):
        load_prices(path)
    with pytest.raises(ConfigError):
        load_prices(tmp_path / "nothing")
