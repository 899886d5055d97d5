"""Do clients notice when experts move between the workers of a running service?

Many streams decode through a service with several expert workers. Phases alternate: one without
anything, one in which experts are migrated all the time, each time for another made-up load, so
that about half of all experts move. Of each phase the times between two chunks of a stream are
taken; the stall is how much longer the longest of them is with migrations than without. The texts
of both must be equal, else the exit status is 1. Last line: JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.eplb import ExpertLoadReport
from xdeepserve.launch.server_process import ServerProcess
from xdeepserve.launch.service import load_service
from xdeepserve.launch.supervisor.client import rebalance_run
from xdeepserve.launch.supervisor.messages import ExpertHeat
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.testing.live_service import LiveService
from xdeepserve.testing.watched_streams import StreamRecord, WatchedLoad, watched_requests

AIM_MS = 20.0
BEGUN_CHUNKS = 4
SKEW = 1.2
"""Exponent of the made-up loads: the n-th expert of a layer has n ** -SKEW of the first one's."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time, and how much was moved in it."""

    begin_s: float
    end_s: float
    num_moves: int
    num_flips: int

    def gaps_ms(self, records: Iterable[StreamRecord]) -> np.ndarray:
        """Times between two chunks of an answer that end within the phase, ascending."""
        gaps = [
            (after - before) * 1e3
            for record in records
            for before, after in zip(record.arrivals_s, record.arrivals_s[1:], strict=False)
            if self.begin_s <= after < self.end_s
        ]
        return np.sort(gaps)


class Migrations:
    """Moves the experts of a service to and fro."""

    def __init__(self, service: LiveService, seed: int) -> None:
        self._run = service.run
        self._service = service
        self._shape = load_service(service.run).shape
        self._rng = np.random.default_rng(seed)

    async def phase(self, duration_s: float, *, is_migrating: bool) -> Phase:
        """Migrate, or only wait, for so long; a migration under way is ended."""
        before, begin_s = await self._heat(), SYSTEM_CLOCK.monotonic()
        if not is_migrating:
            await asyncio.sleep(duration_s)
        while is_migrating and SYSTEM_CLOCK.monotonic() < begin_s + duration_s:
            await rebalance_run(self._run, self._made_up_load())
        end_s, after = SYSTEM_CLOCK.monotonic(), await self._heat()
        num_flips = after.placement_epoch - before.placement_epoch
        return Phase(begin_s, end_s, after.num_moves - before.num_moves, num_flips)

    def _made_up_load(self) -> ExpertLoadReport:
        """In every layer another order of the experts, from hot to cold."""
        num_layers, num_experts = self._shape.num_layers, self._shape.num_experts
        share = 1e6 * np.arange(1, num_experts + 1) ** -SKEW
        load = self._rng.permuted(np.tile(share, (num_layers, 1)), axis=1)
        return ExpertLoadReport(num_layers, num_experts, load.astype("<u4").tobytes())

    async def _heat(self) -> ExpertHeat:
        heat = (await self._service.status()).expert_heat
        assert heat is not None, "the service has expert workers"
        return heat


async def measure(
    service: LiveService, args: argparse.Namespace
) -> tuple[list[tuple[Phase, Phase]], list[list[StreamRecord]]]:
    """(calm, migrating) per round, and what each client got."""
    migrations = Migrations(service, args.seed)
    requests = watched_requests(args.streams, args.tokens)
    server, rounds = service.server, []
    async with WatchedLoad(server.url, server.model, requests, repeats=True) as load:
        await load.until_all_have(BEGUN_CHUNKS)
        # The first phases also fill caches and settle the number of microbatches.
        await migrations.phase(args.seconds, is_migrating=True)
        for _ in range(args.rounds):
            calm = await migrations.phase(args.seconds, is_migrating=False)
            rounds.append((calm, await migrations.phase(args.seconds, is_migrating=True)))
            print(".", end="", file=sys.stderr, flush=True)
        return rounds, await load.finish()


def num_wrong(records: Sequence[Sequence[StreamRecord]]) -> int:
    """Answers that failed, or differ from the first one to the same request."""
    return sum(
        answer.error is not None or answer.text != answers[0].text
        for answers in records
        for answer in answers
    )


def summary(phases: Sequence[Phase], records: Sequence[Sequence[StreamRecord]]) -> dict[str, Any]:
    """Gaps of one kind of phase, milliseconds, and the work done in it."""
    answers = [answer for client in records for answer in client]
    gaps = [phase.gaps_ms(answers) for phase in phases]
    p50, p99, p999 = np.percentile(np.concatenate(gaps), (50, 99, 99.9)).tolist()
    longest = [float(each[-1]) for each in gaps]
    seconds = sum(phase.end_s - phase.begin_s for phase in phases)
    return {
        "p50_ms": p50,
        "p99_ms": p99,
        "p999_ms": p999,
        "longest_ms": longest,
        "longest_median_ms": median(longest),
        "num_gaps": sum(map(len, gaps)),
        "seconds": seconds,
        "tokens_per_s": sum(map(len, gaps)) / seconds,
        "moves": sum(phase.num_moves for phase in phases),
        "flips": sum(phase.num_flips for phase in phases),
    }


def print_summaries(calm: dict[str, Any], moving: dict[str, Any]) -> None:
    """The table that people read."""
    columns = ("p50_ms", "p99_ms", "p999_ms", "longest_median_ms", "tokens_per_s")
    heads = ("gap p50 ms", "p99", "p99.9", "longest", "tokens/s")
    print(f"{'phase':<12}" + "".join(f"{head:>12}" for head in heads) + f"{'moves':>8}{'flips':>8}")
    for name, row in (("calm", calm), ("migrating", moving)):
        cells = "".join(f"{row[column]:>12.2f}" for column in columns)
        print(f"{name:<12}{cells}{row['moves']:>8}{row['flips']:>8}")


def deployment_file(folder: Path, args: argparse.Namespace) -> Path:
    """A service whose experts move when told to, and only then."""
    expert = {"count": args.expert, "replicas": args.replicas, "rebalance_interval_s": 0.0}
    path = folder / "deployment.yaml"
    path.write_text(yaml.safe_dump({"model": args.model, "roles": {"expert": expert}}))
    return path


def main() -> int:
    """Measure and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-moe8")
    parser.add_argument("--expert", type=int, default=2, help="expert workers")
    parser.add_argument("--replicas", type=int, default=1, help="redundant experts on each")
    parser.add_argument("--streams", type=int, default=16, help="requests at the same time")
    parser.add_argument("--tokens", type=int, default=256, help="length of an answer")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of phases")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xm") as folder:
        path = deployment_file(Path(folder), args)
        with ServerProcess("--deployment", str(path)) as server:
            rounds, records = asyncio.run(measure(LiveService(server), args))
    calm = summary([calm for calm, _ in rounds], records)
    moving = summary([moving for _, moving in rounds], records)
    pairs = zip(calm["longest_ms"], moving["longest_ms"], strict=True)
    stall_ms = median(with_moves - without for without, with_moves in pairs)
    wrong = num_wrong(records)
    print_summaries(calm, moving)
    print(f"stall by migration: {stall_ms:.2f} ms, median of the rounds (aim < {AIM_MS:g} ms)")
    print(f"answers that failed or differ: {wrong} of {sum(map(len, records))}")
    document = {
        "benchmark": "migration",
        "config": vars(args),
        "machine": machine_fingerprint(),
        "calm": calm,
        "migrating": moving,
        "stall_ms": stall_ms,
        "aim_ms": AIM_MS,
        "num_wrong": wrong,
    }
    print(json_line(document))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
