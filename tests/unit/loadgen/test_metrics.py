"""Metrics from hand-made records: definitions, percentiles, goodput, what is counted."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.metrics import compute_metrics, parse_slo, percentile
from xdeepserve.loadgen.openai_stream import PromptTokensDetails, UsageReport
from xdeepserve.loadgen.runner import RequestRecord
from xdeepserve.telemetry import RequestTimeline


def record(
    *, arrived: float = 0.0, first: float = 0.5, last: float = 1.5, tokens: int = 11
) -> RequestRecord:
    """A completed request whose server reported usage."""
    timeline = RequestTimeline(arrived, arrived + first, arrived + last, tokens)
    usage = UsageReport(20, tokens, PromptTokensDetails(4))
    done = RequestRecord(timeline, output_len=tokens, usage=usage)
    done.ended_s = arrived + last
    return done


def failure(message: str, *, ended: float = 1.0) -> RequestRecord:
    return RequestRecord(RequestTimeline(0.0), output_len=11, error=message, ended_s=ended)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
def test_percentile_agrees_with_the_inclusive_quantiles(values: list[float]) -> None:
    ordered = sorted(values)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive")
    for q in (1, 50, 90, 99):
        assert percentile(ordered, q) == pytest.approx(cuts[q - 1], abs=1e-6)


def test_percentile_ends_are_the_extremes() -> None:
    assert (percentile([3.0, 5.0, 9.0], 0), percentile([3.0, 5.0, 9.0], 100)) == (3.0, 9.0)
    assert percentile([7.0], 99) == 7.0


def test_latencies_follow_their_definitions() -> None:
    metrics = compute_metrics([record(first=0.5, last=1.5, tokens=11)])
    assert metrics.ttft_ms is not None
    assert metrics.ttft_ms.mean == pytest.approx(500)
    assert metrics.tpot_ms is not None
    assert metrics.tpot_ms.mean == pytest.approx(100)
    assert metrics.e2e_ms is not None
    assert metrics.e2e_ms.max == pytest.approx(1500)


def test_rates_cover_first_arrival_to_last_end() -> None:
    metrics = compute_metrics([record(arrived=10.0), record(arrived=12.5)])
    assert metrics.duration_s == pytest.approx(4.0)
    assert metrics.requests_per_s == pytest.approx(0.5)
    assert metrics.output_tokens_per_s == pytest.approx(22 / 4)
    assert metrics.total_tokens_per_s == pytest.approx((22 + 40) / 4)
    assert metrics.num_cached_tokens == 8


def test_single_token_answer_has_no_tpot() -> None:
    metrics = compute_metrics([record(first=0.5, last=0.5, tokens=1)])
    assert metrics.tpot_ms is None
    assert metrics.ttft_ms is not None


def test_failures_are_counted_and_kept_out_of_latencies() -> None:
    metrics = compute_metrics([record(), failure("boom"), failure("boom"), failure("bang")])
    assert (metrics.num_completed, metrics.num_failed) == (1, 3)
    assert metrics.errors == {"boom": 2, "bang": 1}
    assert metrics.num_output_tokens == 11


def test_all_failed_still_gives_a_result() -> None:
    metrics = compute_metrics([failure("boom")])
    assert (metrics.num_failed, metrics.ttft_ms, metrics.output_tokens_per_s) == (1, None, 0.0)


def test_counting_says_where_counts_come_from() -> None:
    without = record()
    without.usage = None
    assert compute_metrics([record()]).counted_by == "usage"
    assert compute_metrics([without]).counted_by == "chunks"
    assert compute_metrics([record(), without]).counted_by == "mixed"


def test_wrong_lengths_are_counted() -> None:
    short = record(tokens=5)
    short.output_len = 11
    assert compute_metrics([record(), short]).num_wrong_length == 1


def test_goodput_needs_every_target_met() -> None:
    good, slow_start, slow_tokens = record(), record(first=0.9), record(last=9.0)
    records = [good, slow_start, slow_tokens, failure("boom")]
    metrics = compute_metrics(records, slo_ms={"ttft": 600, "tpot": 100.1})
    assert metrics.goodput is not None
    assert metrics.goodput.share == 0.25
    assert metrics.goodput.requests_per_s == pytest.approx(1 / 9)


def test_goodput_at_the_limit_is_good() -> None:
    metrics = compute_metrics([record(first=0.5)], slo_ms={"ttft": 500})
    assert metrics.goodput is not None
    assert metrics.goodput.share == 1.0


def test_slo_is_parsed() -> None:
    assert parse_slo(["ttft:500", "tpot:50", "e2e:8000"]) == {"ttft": 500, "tpot": 50, "e2e": 8000}


@pytest.mark.parametrize("item", ["ttft", "ttft:", "ttft:x", "ttft:0", "ttft:nan", "itl:5", ""])
def test_bad_slo_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="goodput"):
        parse_slo([item])
