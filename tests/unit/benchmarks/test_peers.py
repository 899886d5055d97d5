"""The comparison of engines: same prompts, fair ratios, and a reason in every empty cell."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
from benchmarks.peers import foreign_load
from benchmarks.peers.__main__ import load_rows, machine_name, merge, parse, write
from benchmarks.peers.environment import Command, Unavailable, is_built, mark_built
from benchmarks.peers.llama_cpp import TILE_CONFIG, with_barrier
from benchmarks.peers.measure import Plan, is_far_behind, measure
from benchmarks.peers.models import RANDOM_MODELS, random_checkpoint
from benchmarks.peers.peer import WORKERS, Server, Settings
from benchmarks.peers.table import Row, cells, markdown
from benchmarks.peers.turns import TurnProcess
from benchmarks.peers.workloads import OFFLINE, WORKLOADS, OnlineWorkload, Workload
from benchmarks.peers.xdeepserve import OURS

from xdeepserve import envs
from xdeepserve.models.families import parse_spec

WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
import protocol

def start(settings):
    if settings == "broken":
        raise SystemExit("cannot load")
    def run(order):
        if order["output_len"] == 2:
            raise ValueError("too short")
        print("noise")  # must not reach the answers
        count = len(order["prompts"])
        return protocol.summary(1.0, [2.0] * count, [3.0] * count, order["output_len"])
    return run

protocol.serve(start)
"""


class FakePeer:
    """An engine whose worker answers at once."""

    variants: Mapping[str, tuple[str, ...]] = {"16-bit": ("fine", "broken", "absent"), "8-bit": ()}

    def __init__(self, name: str) -> None:
        self.name = name

    def worker(self, model: str, variant: str, settings: Settings) -> Command:
        if variant == "absent":
            raise Unavailable("is not for sale")
        argv = (sys.executable, "-c", WORKER, json.dumps(variant), str(WORKERS))
        return Command(argv, {})

    def server(self, model: str, variant: str, settings: Settings, port: int) -> Server:
        raise Unavailable("has no server")


def plan(*workloads: Workload | OnlineWorkload, precision: str = "16-bit") -> Plan:
    return Plan(
        models=["m"],
        precisions=[precision],
        workloads=workloads,
        peers=[FakePeer("fake")],
        repeats=2,
        threads=1,
    )


@pytest.mark.parametrize("workload", OFFLINE, ids=lambda w: w.name)
def test_prompts_depend_on_the_seed_and_share_a_prefix(workload: Workload) -> None:
    prompts = workload.prompts("1")
    assert prompts == workload.prompts("1") != workload.prompts("2")
    assert {len(prompt) for prompt in prompts} == {workload.input_len}
    assert len(prompts) == len({tuple(prompt) for prompt in prompts}) == workload.batch
    assert len({tuple(prompt[: workload.shared_len]) for prompt in prompts}) == 1


def test_metrics_are_read_off_an_answer() -> None:
    workload = Workload(
        name="w", batch=2, input_len=10, output_len=5,
        metrics=("output tok/s", "prefill tok/s", "decode tok/s"),
    )  # fmt: skip
    answer = {"seconds": 4.0, "ttft_s": 2.0, "tpot_s": 0.5}
    assert workload.read_metrics(answer) == {
        "output tok/s": 2.5,
        "prefill tok/s": 10.0,
        "decode tok/s": 2.0,
    }


def test_workers_take_turns_and_failures_are_rows(tmp_path: Path) -> None:
    good = Workload(name="good", batch=2, input_len=4, output_len=3)
    short = Workload(name="short", batch=2, input_len=4, output_len=2)
    online = OnlineWorkload(name="online", clients=2)
    with envs.HOME.override(str(tmp_path)):
        finished = list(measure(plan(good, short, online)))
    rows = {(row.workload, row.variant): row for group in finished for row in group}
    assert [group[0].workload for group in finished if group] == ["good", "short", "online"]
    assert [run["output tok/s"] for run in rows["good", "fine"].runs] == [3.0, 3.0]
    assert rows["short", "fine"].reason == "ValueError: too short"
    assert rows["good", "broken"].reason.endswith("cannot load")
    assert rows["good", "absent"].reason == "is not for sale"
    assert rows["online", "fine"].reason == "has no server"
    assert all(bool(row.runs) != bool(row.reason) for row in rows.values())


def test_an_engine_without_a_class_is_a_row() -> None:
    (row,) = [r for group in measure(plan(WORKLOADS["single"], precision="8-bit")) for r in group]
    assert (row.peer, row.workload, row.runs) == ("fake", "single", [])
    assert "8-bit" in row.reason


def row(
    peer: str, variant: str, *values: float, precision: str = "16-bit", reason: str = ""
) -> Row:
    runs = [{"output tok/s": value, "seconds": 1.0} for value in values]
    return Row("m", precision, "w", peer, variant, runs, reason)


def test_ratio_is_against_the_best_variant_of_the_class() -> None:
    rows = [
        row(OURS, "bf16", 30.0, 40.0, 50.0),
        row("a", "x", 10.0, 10.0, 10.0),
        row("a", "y", 20.0, 20.0, 50.0),
        row("b", "x", reason="does not run"),
        row("c", "x", 80.0, precision="8-bit"),
    ]
    first, second = cells(rows)
    assert (first["best_peer"], first["ours"], first["best"]) == ("a y", 40.0, 20.0)
    assert first["ratio"] == 1.5  # of 1.5, 2.0 and 1.0
    assert (first["best_peer_of_any_class"], first["ratio_any_class"]) == ("c x", 0.5)
    assert (second["ours"], second["ratio"]) == (None, None)
    text = markdown([first, second])
    assert "b x does not run" in text
    assert "| 1.50 |" in text


def test_a_peer_far_behind_is_not_measured_further() -> None:
    best, slow = row("a", "x", 10.0, 10.0), row("b", "x", 7.0, 7.0)
    ours, new, hopeless = row(OURS, "bf16", 1.0), row("c", "x", 6.5), row("d", "x", 4.0)
    late, close = row("e", "x", 9.0, 9.0, 9.0), row("f", "x", 9.5, 9.5, 9.5)
    rows = [best, slow, ours, new, hopeless, late, close]
    expected = [False, True, False, False, True, True, False]
    assert [is_far_behind(each, rows) for each in rows] == expected
    slow.runs = [run | {"prefill tok/s": 9.0} for run in slow.runs]  # the best of all at something
    assert not is_far_behind(slow, rows)


def test_a_peer_at_zero_has_no_ratio() -> None:
    (cell,) = cells([row(OURS, "bf16", 5.0), row("a", "x", 0.0)])
    assert (cell["best"], cell["ratio"]) == (0.0, None)


def test_new_rows_replace_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    assert load_rows(path) == []
    machine = {"cpu": "Some CPU (R) 9", "cores": 2, "isa": ["avx2"]}
    old = merge([], [row("a", "x", 1.0), row("b", "x", 2.0)])
    old[0].commit = "abc1234"
    write(
        path,
        {
            "machine": machine,
            "ceilings": [],
            "cells": cells(old),
            "rows": [asdict(r) for r in old],
        },
    )
    merged = merge(load_rows(path), [row("a", "x", 3.0)])
    assert {r.peer: r.median("output tok/s") for r in merged} == {"a": 3.0, "b": 2.0}
    text = path.with_suffix(".md").read_text()
    assert text.count("| m |") == 1
    assert "Commits: abc1234." in text
    assert machine_name(machine) == "some-cpu-r-9-avx2-2c"


def test_what_an_engine_and_its_children_burn_is_its_own() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    run = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n{burn}"
    command = [sys.executable, "-c", f"{run}print('burnt', flush=True)\ninput()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, start_new_session=True, **pipes) as engine:
        assert engine.stdout is not None
        engine.stdout.readline()
        engine_s = foreign_load._own_s(engine.pid) - foreign_load._own_s(-1)
        assert engine_s >= 0.5
        engine.communicate(b"\n")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_process_stands_still_until_its_turn(tmp_path: Path) -> None:
    echo = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (tmp_path / "log").open("w") as log:
        turns = TurnProcess((sys.executable, "-c", echo), os.environ, log, **pipes)
    try:
        assert turns.process.stdin is not None
        assert turns.process.stdout is not None
        for word in ("one\n", "two\n"):
            with turns.turn():
                turns.process.stdin.write(word)
                turns.process.stdin.flush()
                assert turns.process.stdout.readline() == word
            deadline_s = time.monotonic() + 10
            while _state(turns.pid) != "T" and time.monotonic() < deadline_s:
                time.sleep(0.01)
            assert _state(turns.pid) == "T"
    finally:
        turns.stop()
    assert turns.process.returncode is not None


def test_stamp_of_a_build(tmp_path: Path) -> None:
    assert not is_built(tmp_path, "v1")
    mark_built(tmp_path, "v1")
    assert is_built(tmp_path, "v1")
    assert not is_built(tmp_path, "v2")


@pytest.mark.parametrize("name", RANDOM_MODELS)
def test_random_models_are_what_they_are_called(name: str) -> None:
    toy = random_checkpoint(name)
    spec = parse_spec(toy.config)
    assert spec.moe is not None
    assert (spec.moe.gate.num_experts, spec.moe.gate.top_k) == (32, 4)
    count = sum(math.prod(shape) for shape in toy.shapes.values())
    expected = {"qwen3-moe-random": 0.95e9, "deepseek-v3-random": 0.78e9}[name]
    assert abs(count - expected) < 0.03e9


def test_command_line_is_checked() -> None:
    with pytest.raises(SystemExit):
        parse(["--repeats", "0"])
    assert parse(["--peers", "llama_cpp"]).peers == ["llama_cpp"]


def test_tile_configuration_is_stored_before_it_is_loaded() -> None:
    patched = with_barrier(f"tc.palette = 1;\n    {TILE_CONFIG}\n")
    assert patched.index("memory") < patched.index(TILE_CONFIG)
    with pytest.raises(Unavailable, match=r"mmq\.cpp"):
        with_barrier("nothing of the kind")
