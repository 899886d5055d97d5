"""What do clients notice when workers are killed, frozen, added and removed under load?

For every kind of fault a service is started, the same greedy and sampled requests stream through
its gateway at the same time, and the fault is injected while all of them decode; again and again.
Every text must equal that of the undisturbed run, no request may fail or hang, and after the end
neither process nor shared memory may be left: else the exit status is 1. Printed is the longest
time between two chunks that any client saw after the injection, beside that of the undisturbed
run. The aim is for that time; how many miss it even with the undisturbed gap taken off is printed
too. The requests are those that give a chunk for each token. Last line: JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from xdeepserve.launch.server_process import ServerProcess
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.testing.fault_drill import (
    DrillResult,
    Drills,
    Harm,
    freeze_worker,
    kill_worker,
    scale_through,
    steady_requests,
    thaw_worker,
)
from xdeepserve.testing.live_service import LiveRun, LiveService
from xdeepserve.testing.watched_streams import watched_requests

CRASH_WINDOW_S = 4.0
"""Faults that are injected on purpose, one after the other, are no crash loop."""

FROZEN_S = 5.0
LOAD_S = 6.0
"""How long an undisturbed run lasts, where the load goes on during the injection."""

LONG_TOKENS = 64
"""Answers have at least so many there: the prefill of requests that begin is a gap to others."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fault.

    Attributes:
        about: for people.
        counts: workers of each role.
        harms: injected in turn.
        aim_s: for the longest gap.
        replicas: redundant experts on each expert worker.
        repeats: the load goes on for as long as the injection takes.
        supervision: settings of the supervisor that differ from the default.
    """

    about: str
    counts: Mapping[str, int]
    harms: tuple[Harm, ...]
    aim_s: float
    replicas: int = 0
    repeats: bool = False
    supervision: Mapping[str, float] = field(default_factory=dict)


def shape(attention: int, ffn: int, expert: int) -> dict[str, int]:
    """Workers of each role."""
    return {"attention": attention, "ffn": ffn, "expert": expert}


KINDS = {
    "expert-replica": Kind(
        "SIGKILL of an expert worker; the other one holds all its experts",
        shape(1, 1, 2), (kill_worker("expert0"), kill_worker("expert1")), 1.0, replicas=4,
    ),
    "expert-spare": Kind(
        "SIGKILL of an expert worker; no replicas, another worker steps in",
        shape(1, 1, 2), (kill_worker("expert0"), kill_worker("expert1")), 1.0,
    ),
    "expert-restart": Kind(
        "SIGKILL of the only expert worker", shape(1, 1, 1), (kill_worker("expert0"),), 3.0
    ),
    "ffn-spare": Kind(
        "SIGKILL of an FFN worker; another one steps in",
        shape(1, 2, 1), (kill_worker("ffn0"), kill_worker("ffn1")), 1.0,
    ),
    "ffn-restart": Kind(
        "SIGKILL of the only FFN worker", shape(1, 1, 1), (kill_worker("ffn0"),), 3.0
    ),
    "expert-thawed": Kind(
        f"SIGSTOP of an expert worker, SIGCONT after {FROZEN_S:g} s; the same life serves again",
        shape(1, 1, 2),
        (thaw_worker("expert0", FROZEN_S), thaw_worker("expert1", FROZEN_S)), 1.0,
        repeats=True, supervision={"freeze_timeout_s": 2 * FROZEN_S},
    ),
    "expert-frozen": Kind(
        "SIGSTOP of an expert worker; the supervisor kills it when it has been frozen too long",
        shape(1, 1, 2), (freeze_worker("expert0"), freeze_worker("expert1")), 1.0, repeats=True,
    ),
    "group-spare": Kind(
        "SIGKILL of a DP group; the other one continues its requests",
        shape(2, 1, 1), (kill_worker("dp0"), kill_worker("dp1")), 1.0,
    ),
    "group-restart": Kind(
        "SIGKILL of the only DP group", shape(1, 1, 1), (kill_worker("dp0"),), 3.0
    ),
    "supervisor": Kind(
        "SIGKILL of the supervisor", shape(1, 1, 1), (kill_worker("supervisor"),), 1.0
    ),
    "scale-expert": Kind(
        "xds scale through 1-2-3-1 expert workers",
        shape(1, 1, 1), (scale_through("expert", (2, 3, 1)),), 0.2,
        repeats=True,
    ),
    "scale-ffn": Kind(
        "xds scale through 1-2-1 FFN workers",
        shape(1, 1, 1), (scale_through("ffn", (2, 1)),), 0.2, repeats=True,
    ),
    "scale-attention": Kind(
        "xds scale through 1-2-1 DP groups",
        shape(1, 1, 1), (scale_through("attention", (2, 1)),), 0.2,
        repeats=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """All repeats of one kind. Gaps are longest ones, of one repeat each."""

    undisturbed: list[DrillResult]
    disturbed: list[DrillResult]
    leftovers: list[str]
    exit_code: int

    @property
    def errors(self) -> Counter[str]:
        return sum((result.errors for result in self.disturbed), Counter())

    @property
    def num_different(self) -> int:
        return sum(result.num_different for result in self.disturbed)

    @property
    def is_clean(self) -> bool:
        runs = [*self.undisturbed, *self.disturbed]
        return all(run.is_clean for run in runs) and not self.leftovers and not self.exit_code

    @property
    def gap_s(self) -> float:
        return max(result.gap_s for result in self.disturbed)

    def num_late(self, aim_s: float) -> int:
        """Repeats whose longest gap misses the aim."""
        return sum(result.gap_s > aim_s for result in self.disturbed)

    def num_late_by_fault(self, aim_s: float) -> int:
        """Repeats that miss it even without the longest gap of the undisturbed runs."""
        return self.num_late(aim_s + self.undisturbed_gap_s)

    @property
    def undisturbed_gap_s(self) -> float:
        return max(result.gap_s for result in self.undisturbed)


def deployment_file(folder: Path, kind: Kind, model: str) -> Path:
    """What `kind` is tried on."""
    roles: dict[str, Any] = {role: {"count": count} for role, count in kind.counts.items()}
    roles["expert"]["replicas"] = kind.replicas
    supervision = {"crash_loop_window_s": CRASH_WINDOW_S, **kind.supervision}
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump({"model": model, "roles": roles, "supervision": supervision}))
    return path


async def try_kind(kind: Kind, service: LiveService, args: argparse.Namespace) -> Outcome:
    """Undisturbed runs, then all repeats, then the end."""
    num_tokens = max(args.tokens, LONG_TOKENS) if kind.repeats else args.tokens
    requests = await steady_requests(service, args.streams, num_tokens)
    drills = Drills(service, requests)
    # The first one also fills prefix caches and tunes microbatches, and is not timed.
    await drills.undisturbed()
    undisturbed_s = LOAD_S if kind.repeats else 0.0
    undisturbed = [await drills.undisturbed(undisturbed_s) for _ in range(args.undisturbed)]
    disturbed = []
    for repeat in range(args.times):
        harm = kind.harms[repeat % len(kind.harms)]
        disturbed.append(await drills.drill(harm, repeats=kind.repeats))
        print(".", end="", file=sys.stderr, flush=True)
    exit_code = service.stop()
    return Outcome(undisturbed, disturbed, await service.leftovers(), exit_code)


def run_kind(name: str, args: argparse.Namespace) -> Outcome:
    """Start a service for one kind and try it."""
    kind = KINDS[name]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="xf"))
        path = deployment_file(Path(folder), kind, args.model)
        arguments = ("--deployment", str(path))
        server = stack.enter_context(ServerProcess(*arguments, show_stderr=args.show_log))
        return asyncio.run(try_kind(kind, LiveService(server), args))


async def kill_gateway(service: LiveService, args: argparse.Namespace) -> list[str]:
    """SIGKILL of the gateway while it streams; what is left of the run."""
    requests = watched_requests(args.streams, args.tokens)
    drills = Drills(service, requests)

    async def harm(run: LiveRun) -> None:
        service.kill()

    await drills.drill(harm)
    return await service.leftovers()


def run_gateway_kill(args: argparse.Namespace) -> list[str]:
    """Everything of a run must end with its gateway; what did not."""
    with ServerProcess(
        args.model, "--attention", "2", "--ffn", "1", "--expert", "2", show_stderr=args.show_log
    ) as server:
        return asyncio.run(kill_gateway(LiveService(server), args))


def print_outcome(name: str, outcome: Outcome) -> None:
    """One row, and what went wrong below it."""
    kind = KINDS[name]
    gaps = [result.gap_s for result in outcome.disturbed]
    settled_s = median(result.settled_s for result in outcome.disturbed)
    print(
        f"{name:<16}{len(outcome.disturbed):>6}{sum(outcome.errors.values()):>8}"
        f"{outcome.num_different:>11}{outcome.gap_s:>9.3f}{median(gaps):>9.3f}"
        f"{outcome.undisturbed_gap_s:>13.3f}{outcome.gap_s - outcome.undisturbed_gap_s:>9.3f}"
        f"{kind.aim_s:>6.1f}{settled_s:>10.2f}",
        flush=True,
    )
    if num_late := outcome.num_late(kind.aim_s):
        by_fault = outcome.num_late_by_fault(kind.aim_s)
        print(f"  {num_late} of {len(gaps)} miss the aim, {by_fault} by more than undisturbed")
    for message, count in outcome.errors.items():
        print(f"  failed {count} x: {message}")
    for item in outcome.leftovers:
        print(f"  left behind: {item}")
    if outcome.exit_code:
        print(f"  the gateway ended with code {outcome.exit_code}")
    if not all(result.is_clean for result in outcome.undisturbed):
        print("  the undisturbed runs differ or fail")


def result_of(name: str, outcome: Outcome) -> dict[str, Any]:
    """For the JSON line."""
    kind = KINDS[name]
    return {
        "about": kind.about,
        "counts": dict(kind.counts),
        "aim_s": kind.aim_s,
        "is_clean": outcome.is_clean,
        "num_late": outcome.num_late(kind.aim_s),
        "num_late_by_fault": outcome.num_late_by_fault(kind.aim_s),
        "is_within_aim": outcome.num_late(kind.aim_s) == 0,
        "longest_gap_s": outcome.gap_s,
        "longest_gap_undisturbed_s": outcome.undisturbed_gap_s,
        "gaps_s": [round(result.gap_s, 4) for result in outcome.disturbed],
        "settled_s": [round(result.settled_s, 3) for result in outcome.disturbed],
        "num_answers": sum(result.num_answers for result in outcome.disturbed),
        "errors": dict(outcome.errors),
        "num_different": outcome.num_different,
        "leftovers": outcome.leftovers,
    }


def main() -> int:
    """Try every kind and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--times", type=int, default=20, help="injections of each kind")
    parser.add_argument("--streams", type=int, default=32, help="requests at the same time")
    parser.add_argument("--tokens", type=int, default=48, help="length of an answer")
    parser.add_argument("--undisturbed", type=int, default=3, help="timed undisturbed runs")
    parser.add_argument("--model", default="smollm2-135m-moe8")
    parser.add_argument("--strict", action="store_true", help="fail when an aim is missed")
    parser.add_argument("--show-log", action="store_true", help="the service's log on stderr")
    args = parser.parse_args()
    print(
        f"{'kind':<16}{'times':>6}{'failed':>8}{'different':>11}{'gap s':>9}{'median':>9}"
        f"{'undisturbed':>13}{'more':>9}{'aim':>6}{'settled s':>10}"
    )
    outcomes = {}
    for name in args.kinds:
        outcomes[name] = run_kind(name, args)
        print_outcome(name, outcomes[name])
    leftovers = run_gateway_kill(args)
    print(f"SIGKILL of the gateway leaves behind: {', '.join(leftovers) or 'nothing'}")
    is_clean = not leftovers and all(outcome.is_clean for outcome in outcomes.values())
    document = {
        "benchmark": "faults",
        "config": vars(args),
        "machine": machine_fingerprint(),
        "results": {name: result_of(name, outcome) for name, outcome in outcomes.items()},
        "left_by_killed_gateway": leftovers,
        "is_clean": is_clean,
    }
    print(json_line(document))
    is_met = all(result["is_within_aim"] for result in document["results"].values())
    return 0 if is_clean and (is_met or not args.strict) else 1


if __name__ == "__main__":
    sys.exit(main())
