"""bench_ablation: each step adds one thing, and what is reported is what was measured."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from benchmarks.bench_ablation import Result, Run, Step, find_batch, main, steps, table

from tests.toys import write_toy
from xdeepserve.testing.toy_models import toy_checkpoint


@pytest.mark.parametrize(
    ("isas", "threads"), [(["portable"], 1), (["portable", "avx2", "avx512", "amx"], 2)]
)
def test_a_step_changes_one_thing(isas: list[str], threads: int) -> None:
    found = steps(isas, threads)
    assert (found[0].backend, found[-1].isa, found[-1].threads) == ("reference", isas[-1], threads)
    for before, after in pairwise(found[1:]):
        changed = [
            name
            for name in ("dtype", "isa", "threads", "kv_cache_dtype", "batches")
            if getattr(before, name) != getattr(after, name)
        ]
        assert len(changed) == 1


def test_the_batch_with_the_highest_rate_within_the_slo_is_found() -> None:
    def measure(batch: int) -> Run:
        return Run(tokens_per_s=min(batch, 24) * 10.0, tpot_ms=1.0 * batch)

    assert find_batch(measure, slo_ms=50.0, most=64) == 48
    assert find_batch(measure, slo_ms=20.0, most=64) == 16
    assert find_batch(measure, slo_ms=50.0, most=1) == 1
    assert find_batch(measure, slo_ms=0.5, most=64) == 1


def test_ratios_are_medians_over_repeats() -> None:
    first = Result(Step("a", "bf16", "avx2", 1), batch=1)
    second = Result(Step("b", "bf16", "avx2", 2), batch=1)
    for one, two in ((1.0, 2.0), (2.0, 8.0), (1.0, 3.0)):
        first.add(Run(one, 5.0))
        second.add(Run(two, 4.0))
    rows = table([first, second])
    assert [row["ratio"] for row in rows] == [1.0, 3.0]
    assert [row["tokens_per_s"] for row in rows] == [1.0, 3.0]


def test_every_step_of_this_machine_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_toy(tmp_path / "toy", toy_checkpoint("llama"))
    flags = ["--repeats", "1", "--input-len", "4", "--output-len", "3", "--threads", "1"]
    assert main([str(tmp_path / "toy"), *flags, "--slo-ms", "10000"]) == 0
    out = capfd.readouterr().out
    assert "above the SLO" not in out
    rows = json.loads(out.splitlines()[-1])["steps"]
    assert {row["backend"] for row in rows} == {"reference", "cpu"}
    assert all(row["tokens_per_s"] > 0 and row["batch"] > 0 for row in rows)
