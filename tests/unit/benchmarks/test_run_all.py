"""The benchmark runner gathers documents and notices programs that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks.run_all import last_json, main

GOOD = "print('table')\nprint('{\"value\": 3}')\n"


@pytest.mark.parametrize(
    ("stdout", "document"),
    [
        ('a\n{"x": 1}\n', {"x": 1}),
        ('{"x": 1}\n\n', {"x": 1}),
        ('{"x": 1}\ntrailing\n', None),
        ("[1]\n", None),
        ("", None),
    ],
)
def test_last_json(stdout: str, document: object) -> None:
    assert last_json(stdout) == document


def run(
    folder: Path, programs: dict[str, str], capfd: pytest.CaptureFixture[str], *flags: str
) -> tuple[int, dict[str, object], str]:
    for name, source in programs.items():
        (folder / f"{name}.py").write_text(source)
    code = main(folder, list(flags))
    out = capfd.readouterr().out
    return code, json.loads(out.splitlines()[-1])["results"], out


def test_documents_are_gathered(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    programs = {"bench_a": GOOD, "bench_b": GOOD, "other": "raise SystemExit(3)"}
    code, results, out = run(tmp_path, programs, capfd)
    assert code == 0
    assert results == {"a": {"value": 3}, "b": {"value": 3}}
    assert "table" in out


def test_failures_are_named_and_the_rest_still_runs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    programs = {
        "bench_a": GOOD + "raise SystemExit(3)",
        "bench_b": "print('no document')",
        "bench_c": GOOD,
    }
    code, results, out = run(tmp_path, programs, capfd)
    assert code == 1
    assert results == {"a": None, "b": None, "c": {"value": 3}}
    assert "bench_a: exit status 3" in out
    assert "bench_b: its last line is not a JSON object" in out


def test_named_benchmarks_run_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, results, _ = run(tmp_path, {"bench_a": GOOD, "bench_b": "1/0"}, capfd, "a")
    assert (code, list(results)) == (0, ["a"])


def test_unknown_name_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path, {"bench_a": GOOD}, capfd, "z")
