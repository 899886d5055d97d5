"""Reports: the fingerprint, the progress bar on terminals only, warnings to readers."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from xdeepserve.loadgen.metrics import compute_metrics
from xdeepserve.loadgen.openai_stream import PromptTokensDetails, UsageReport
from xdeepserve.loadgen.report import ProgressBar, json_line, machine_fingerprint, warnings_for
from xdeepserve.loadgen.runner import RequestRecord
from xdeepserve.telemetry import RequestTimeline


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def make_record(*, cached: int = 0, output_len: int = 4) -> RequestRecord:
    usage = UsageReport(100, 4, PromptTokensDetails(cached))
    return RequestRecord(RequestTimeline(0.0, 1.0, 2.0, 4), output_len, ended_s=2.0, usage=usage)


def test_fingerprint_is_json_and_names_the_machine() -> None:
    machine = json.loads(json_line(machine_fingerprint()))
    assert machine["cpu"]
    assert machine["cores"] >= 1


def test_json_line_is_one_line_with_null_for_nan() -> None:
    assert json_line({"a": float("nan"), "b": "x\ny"}) == '{"a":null,"b":"x\\ny"}'


def test_progress_bar_is_silent_off_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    bar = ProgressBar(2, "bench")
    bar.advance(is_failed=False)
    bar.close()
    assert stream.getvalue() == ""


def test_progress_bar_counts_failures_and_wipes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    bar = ProgressBar(2, "bench")
    bar.advance(is_failed=False)
    bar.advance(is_failed=True)
    bar.close()
    assert "2/2, 1 failed" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_clean_run_has_no_warnings() -> None:
    assert warnings_for(compute_metrics([make_record()]), shared_prefix=False) == []


def test_cache_hits_are_pointed_out_unless_asked_for() -> None:
    metrics = compute_metrics([make_record(cached=50)])
    assert "prefix cache" in warnings_for(metrics, shared_prefix=False)[0]
    assert warnings_for(metrics, shared_prefix=True) == []


def test_other_doubts_are_pointed_out() -> None:
    metrics = compute_metrics([make_record(output_len=9)])
    doubtful = replace(metrics, counted_by="chunks", lag_ms_p99=50.0)
    notes = " ".join(warnings_for(doubtful, shared_prefix=False))
    assert "another length" in notes
    assert "chunks" in notes
    assert "busy" in notes
