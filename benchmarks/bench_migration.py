"""Do clients notice when experts move between the workers of a running service?

Many streams decode through a service with several expert workers. Phases alternate: one without
anything; one in which experts are migrated all the time, each time for another made-up load, so
that about half of all experts move; one with a single flip each second. Of each phase the times
between two chunks of a stream are taken. The stall is measured twice: by how much the longest of
them all with migrations exceeds the longest without, and round by round, which is mostly the noise
of the machine; and flip by flip, see flip_stalls.py. The texts of all must be equal, else the exit
status is 1. Last line: JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from flip_stalls import (
    Moment,
    print_longest,
    print_stalls,
    quiet_moments,
    stall_of_longest,
    stall_summary,
    stalls_ms,
)

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
FLIP_DISTANCE_S = 1.0
"""Between two flips that are looked at one by one."""

FLIP_LAYERS = 4
"""Layers in which experts move in such a flip."""

FEED_S = 0.02
"""A group looks so often for a new placement."""

SKEW = 1.2
"""Exponent of the made-up loads: the n-th expert of a layer has n ** -SKEW of the first one's."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of time, and how much was moved in it."""

    begin_s: float
    end_s: float
    num_moves: int
    num_flips: int
    flips: tuple[Moment, ...] = ()

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
        share = 1e6 * np.arange(1, self._shape.num_experts + 1) ** -SKEW
        self._load = np.tile(share, (self._shape.num_layers, 1))

    async def phase(self, duration_s: float, *, is_migrating: bool) -> Phase:
        """Migrate, or only wait, for so long; a migration under way is ended."""
        before, begin_s = await self._heat(), SYSTEM_CLOCK.monotonic()
        if not is_migrating:
            await asyncio.sleep(duration_s)
        while is_migrating and SYSTEM_CLOCK.monotonic() < begin_s + duration_s:
            self._load = self._other_load(range(self._shape.num_layers))
            await rebalance_run(self._run, self._report())
        return await self._ended(begin_s, before)

    async def single_flips(self, duration_s: float) -> Phase:
        """A small migration now and then; those that were one flip are noted."""
        before, begin_s, flips = await self._heat(), SYSTEM_CLOCK.monotonic(), []
        epoch, next_s = before.placement_epoch, begin_s
        while next_s < begin_s + duration_s:
            await asyncio.sleep(next_s - SYSTEM_CLOCK.monotonic())
            next_s += FLIP_DISTANCE_S
            layers = self._rng.permutation(self._shape.num_layers)[:FLIP_LAYERS]
            self._load = self._other_load(layers)
            asked_s = SYSTEM_CLOCK.monotonic()
            placement = (await rebalance_run(self._run, self._report())).placement
            assert placement is not None, "the service has expert workers"
            if placement.epoch == epoch + 1:
                flips.append(Moment(asked_s, self._published_s() + FEED_S))
            epoch = placement.epoch
        return replace(await self._ended(begin_s, before), flips=tuple(flips))

    def _published_s(self) -> float:
        """Monotonic time at which the latest placement was."""
        age_s = SYSTEM_CLOCK.wall() - self._run.state_path.stat().st_mtime
        return SYSTEM_CLOCK.monotonic() - age_s

    async def _ended(self, begin_s: float, before: ExpertHeat) -> Phase:
        end_s, after = SYSTEM_CLOCK.monotonic(), await self._heat()
        num_flips = after.placement_epoch - before.placement_epoch
        return Phase(begin_s, end_s, after.num_moves - before.num_moves, num_flips)

    def _other_load(self, layers: Iterable[int]) -> np.ndarray:
        """[L, E] tokens: in these layers another order of the experts, from hot to cold."""
        load = self._load.copy()
        for layer_idx in layers:
            load[layer_idx] = self._rng.permutation(load[layer_idx])
        return load

    def _report(self) -> ExpertLoadReport:
        load = self._load.astype("<u4").tobytes()
        return ExpertLoadReport(self._shape.num_layers, self._shape.num_experts, load)

    async def _heat(self) -> ExpertHeat:
        heat = (await self._service.status()).expert_heat
        assert heat is not None, "the service has expert workers"
        return heat


async def measure(
    service: LiveService, args: argparse.Namespace
) -> tuple[list[tuple[Phase, Phase, Phase]], list[list[StreamRecord]]]:
    """(calm, migrating, single flips) per round, and what each client got."""
    migrations = Migrations(service, args.seed)
    requests = watched_requests(args.streams, args.tokens)
    server, rounds = service.server, []
    async with WatchedLoad(server.url, server.model, requests, repeats=True) as load:
        await load.until_all_have(BEGUN_CHUNKS)
        # The first phases also fill caches and settle the number of microbatches.
        await migrations.phase(args.seconds, is_migrating=True)
        for _ in range(args.rounds):
            calm = await migrations.phase(args.seconds, is_migrating=False)
            moving = await migrations.phase(args.seconds, is_migrating=True)
            rounds.append((calm, moving, await migrations.single_flips(args.seconds)))
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


def flip_stalls(
    rounds: Sequence[tuple[Phase, Phase, Phase]], records: Sequence[Sequence[StreamRecord]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Stalls at flips, and at as many moments without one."""
    answers = [answer for client in records for answer in client]
    flips = [flip for _, _, single in rounds for flip in single.flips]
    quiet = [
        moment
        for calm, _, single in rounds
        for moment in quiet_moments(calm.begin_s, calm.end_s, single.flips)
    ]
    return stall_summary(stalls_ms(flips, answers)), stall_summary(stalls_ms(quiet, answers))


def print_summaries(rows: dict[str, dict[str, Any]]) -> None:
    """The phases."""
    columns = ("p50_ms", "p99_ms", "p999_ms", "longest_median_ms", "tokens_per_s")
    heads = ("gap p50 ms", "p99", "p99.9", "longest", "tokens/s")
    print(f"{'phase':<13}" + "".join(f"{head:>12}" for head in heads) + f"{'moves':>8}{'flips':>8}")
    for name, row in rows.items():
        cells = "".join(f"{row[column]:>12.2f}" for column in columns)
        print(f"{name:<13}{cells}{row['moves']:>8}{row['flips']:>8}")


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
    calm, moving, single = (
        summary([phases[kind] for phases in rounds], records) for kind in range(3)
    )
    stall = stall_of_longest(calm["longest_ms"], moving["longest_ms"])
    wrong = num_wrong(records)
    at_flips, without = flip_stalls(rounds, records)
    print_summaries({"calm": calm, "migrating": moving, "single flips": single})
    print_stalls({"at a single flip": at_flips, "when nothing flips": without})
    print_longest(stall, AIM_MS)
    print(f"answers that failed or differ: {wrong} of {sum(map(len, records))}")
    document = {
        "benchmark": "migration",
        "config": vars(args),
        "machine": machine_fingerprint(),
        "calm": calm,
        "migrating": moving,
        "single_flips": single,
        "stall": stall,
        "at_a_flip": at_flips,
        "without_a_flip": without,
        "aim_ms": AIM_MS,
        "num_wrong": wrong,
    }
    print(json_line(document))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
