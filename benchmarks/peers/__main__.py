"""How do we compare with other engines here? From the root: `python -m benchmarks.peers`.

For each model, precision class and workload every engine is measured in turn, `--repeats` times:
in one turn, all run the same prompts one after the other. A cell that cannot be measured has a
reason. Results join those already in the output file as each workload is done, unless they are
measured again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.measure import Plan, measure
from benchmarks.peers.models import MODELS
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.peer import PRECISIONS, Peer
from benchmarks.peers.plot import plot
from benchmarks.peers.table import Row, cells, markdown
from benchmarks.peers.transformers import Transformers
from benchmarks.peers.vllm import Vllm, VllmPace
from benchmarks.peers.workloads import WORKLOADS
from benchmarks.peers.xdeepserve import XDeepServe

from xdeepserve import envs
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.ops.machine import measure_ceilings

RESULTS: Final = Path(__file__).resolve().parent.parent / "results"


def all_peers() -> dict[str, Peer]:
    """Every engine by the name of its module."""
    return {
        "xdeepserve": XDeepServe(),
        "llama_cpp": LlamaCpp(),
        "openvino": OpenVino(),
        "transformers": Transformers(),
        "vllm": Vllm(),
        "vllm_pace": VllmPace(),
    }


def machine_name(fingerprint: dict[str, Any]) -> str:
    """A file name for a machine: CPU, best instruction set, cores."""
    cpu = re.sub(r"[^a-z0-9]+", "-", str(fingerprint["cpu"]).lower()).strip("-")
    isa = str(fingerprint["isa"][-1]).partition("_")[0] if fingerprint["isa"] else "plain"
    return f"{cpu}-{isa}-{fingerprint['cores']}c"


def load_rows(path: Path) -> list[Row]:
    """The rows of an earlier output file; none when there is no such file."""
    if not path.is_file():
        return []
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """New rows in place of old ones of the same engine, workload, class and model."""
    measured = {(*row.key, row.peer, row.variant) for row in new}
    kept = [row for row in old if (*row.key, row.peer, row.variant) not in measured]
    order = {name: idx for idx, name in enumerate((*MODELS, *PRECISIONS, *WORKLOADS))}
    return sorted([*kept, *new], key=lambda row: [order.get(part, len(order)) for part in row.key])


def write(path: Path, document: dict[str, Any]) -> None:
    """JSON, Markdown and, with matplotlib, PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    machine = document["machine"]
    title = f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['isa'])}"
    commits = ", ".join(dict.fromkeys(row["commit"] for row in document["rows"] if row["commit"]))
    text = f"# Peers: {title}\n\nCommits: {commits}. Ceilings: {document['ceilings']}\n\n"
    path.with_suffix(".md").write_text(text + markdown(document["cells"]) + "\n")
    plot(document["cells"], path.with_suffix(".png"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    peers = all_peers()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--peers", nargs="+", choices=peers, default=list(peers))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--home", help="instead of XDEEPSERVE_HOME: models and engines")
    parser.add_argument("--output", type=Path, help="default: peers-MACHINE.json in results/")
    parser.add_argument("--prepare", action="store_true", help="only build and convert")
    args = parser.parse_args(arguments)
    if args.repeats < 1 or args.threads < 1:
        parser.error("--repeats and --threads must be at least 1")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, print the table and the JSON line."""
    args = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the engines, too
    if args.home:
        envs.HOME.export(args.home)
    plan = Plan(
        models=args.models,
        precisions=args.precisions,
        workloads=[WORKLOADS[name] for name in args.workloads],
        peers=[all_peers()[name] for name in args.peers],
        repeats=0 if args.prepare else args.repeats,
        threads=args.threads,
    )
    machine = machine_fingerprint()
    path = args.output or RESULTS / f"peers-{machine_name(machine)}.json"
    rows: list[Row] = []
    for finished in measure(plan):
        rows += finished
        if not args.prepare and finished:
            ceilings = [asdict(measure_ceilings(n)) for n in sorted({1, args.threads})]
            write(path, document(machine, ceilings, merge(load_rows(path), rows)))
    if args.prepare:
        return 0
    print(markdown(cells(rows)))
    print(json_line({"benchmark": "peers", "output": str(path), "cells": cells(rows)}))
    return 0


def document(
    machine: dict[str, Any], ceilings: list[dict[str, Any]], rows: Sequence[Row]
) -> dict[str, Any]:
    """What the output file holds; the ceilings are those of the last workload's time."""
    return {
        "benchmark": "peers",
        "machine": machine,
        "ceilings": ceilings,
        "cells": cells(rows),
        "rows": [asdict(row) for row in rows],
    }


if __name__ == "__main__":
    sys.exit(main())
