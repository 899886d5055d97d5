"""The programs that ship with XCCL run: the example, and a benchmark of a few small points."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.multiproc.xccl.processes import HARD_LIMIT_S, ROOT
from xdeepserve.errors import XcclError
from xdeepserve.xccl.bench import BenchOptions, run_bench
from xdeepserve.xccl.bench_race import library


def test_the_pingpong_example() -> None:
    done = subprocess.run(
        [sys.executable, "examples/03_xccl_pingpong.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HARD_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    assert "received [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]" in done.stdout


def test_the_benchmark_ends_in_one_line_of_json() -> None:
    options = BenchOptions(
        seconds=0.001,
        repeats=1,
        sizes=(8, 100_000),
        crowd_sizes=(8,),
        crowds=(4,),
        num_tokens=(3,),
        hidden_sizes=(64,),
        top_ks=(2,),
        num_ranks=(3,),
        with_peers=False,
    )
    lines: list[str] = []
    numbers = run_bench(options, lines.append)
    assert json.loads(lines[-1]) == numbers
    assert set(numbers["p2p"]["xccl"]) == {"8", "100000"}
    assert numbers["crowd"]["4"]["xccl"]["8"]["trips_per_s"] > 0
    for name in ("a2e+e2a", "dispatch+combine"):
        (point,) = numbers[name]
        assert 0 < point["p50"] <= point["p99"]
    assert numbers["ceilings"]["cache_line_round_trip_us"] > 0


def test_a_library_that_does_not_start_is_an_error_with_its_last_words() -> None:
    with pytest.raises(XcclError, match=r"nosuch: no result .*KeyError"), library("nosuch", 2):
        pass
