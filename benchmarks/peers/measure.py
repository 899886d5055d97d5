"""The turns: who is measured when.

for model, class:  start every engine's worker        (one that cannot: a row with the reason)
    for workload:  warm up, then repeats x engines    (interleaved, same prompts in a turn)
                   then the same with every engine's server

Whose turn it is not stands still (SIGSTOP). A peer that is far behind the best one after a few
repeats is not measured further in that workload.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

from benchmarks.peers.environment import Unavailable, head_commit
from benchmarks.peers.foreign_load import undisturbed
from benchmarks.peers.online import ServerProcess
from benchmarks.peers.peer import Peer, Settings, WorkerProcess
from benchmarks.peers.table import METRICS, Row
from benchmarks.peers.workloads import (
    MAX_MODEL_LEN,
    MAX_SEQS,
    WARM_UP_SEED,
    OnlineWorkload,
    Workload,
)
from benchmarks.peers.xdeepserve import OURS

FAR_BEHIND: Final = {1: 0.6, 2: 0.8, 3: 0.93}
"""Repeats -> share of the best peer's median; below it in every metric a peer is far behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be measured; `repeats` 0 only starts the workers, so that all gets built."""

    models: Sequence[str]
    precisions: Sequence[str]
    workloads: Sequence[Workload | OnlineWorkload]
    peers: Sequence[Peer]
    repeats: int
    threads: int

    def settings(self, *, prefix_caching: bool) -> Settings:
        """For all engines."""
        return Settings(
            threads=self.threads,
            max_seqs=MAX_SEQS,
            max_model_len=MAX_MODEL_LEN,
            prefix_caching=prefix_caching,
        )


@dataclass(frozen=True, slots=True)
class Entrant:
    """A variant of an engine, in one model and class."""

    peer: Peer
    variant: str

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.peer.name} {self.variant}"


def measure(plan: Plan) -> Iterator[list[Row]]:
    """Everything, a workload at a time; prints each value as it is measured."""
    for model in plan.models:
        for precision in plan.precisions:
            entrants = [
                Entrant(peer, variant)
                for peer in plan.peers
                for variant in peer.variants[precision]
            ]
            missing = [peer for peer in plan.peers if not peer.variants[precision]]
            for workload in plan.workloads:
                yield [_no_variant(model, precision, workload.name, peer) for peer in missing]
            yield from _measure_class(plan, model, precision, entrants)


def _no_variant(model: str, precision: str, workload: str, peer: Peer) -> Row:
    return Row(model, precision, workload, peer.name, "", reason=f"has no {precision} weights here")


def _measure_class(
    plan: Plan, model: str, precision: str, entrants: Sequence[Entrant]
) -> Iterator[list[Row]]:
    """The rows of one model in one class: workers that stay up first, then servers."""
    batches = [w for w in plan.workloads if isinstance(w, Workload)]
    for is_shared in (False, True):
        group = [w for w in batches if bool(w.shared_len) is is_shared]
        if group:
            yield from _measure_batches(plan, model, precision, entrants, group)
    online = [w for w in plan.workloads if isinstance(w, OnlineWorkload)]
    if online and plan.repeats:
        yield from _measure_servers(plan, model, precision, entrants, online)


def _measure_batches(
    plan: Plan,
    model: str,
    precision: str,
    entrants: Sequence[Entrant],
    workloads: Sequence[Workload],
) -> Iterator[list[Row]]:
    settings = plan.settings(prefix_caching=any(w.shared_len for w in workloads))
    workers: dict[Entrant, WorkerProcess] = {}
    rows = _empty_rows(model, precision, entrants, workloads)
    with ExitStack() as stack:
        for entrant in entrants:
            try:
                command = entrant.peer.worker(model, entrant.variant, settings)
                worker = WorkerProcess(f"{entrant.name}-{model}", command)
                workers[entrant] = stack.enter_context(worker)
            except Unavailable as exc:
                _excuse(rows, entrant, exc)
        for workload in workloads:
            if plan.repeats:
                _take_turns(plan.repeats, workload, workers, rows)
            yield _of_workload(rows, workload.name)


def _take_turns(
    repeats: int,
    workload: Workload,
    workers: dict[Entrant, WorkerProcess],
    rows: dict[tuple[str, Entrant], Row],
) -> None:
    for seed in (WARM_UP_SEED, *map(str, range(repeats))):
        order = workload.order(seed)
        for entrant, worker in workers.items():
            row = rows[workload.name, entrant]
            if row.reason or is_far_behind(row, _of_workload(rows, workload.name)):
                continue
            try:
                if seed == WARM_UP_SEED:
                    worker.ask(order)
                    continue
                answer = undisturbed(worker.pid, partial(worker.ask, order))
            except Unavailable as exc:
                row.reason = str(exc)
                print(f"{row.model} {entrant.name} {workload.name}: {exc}", flush=True)
                continue
            row.runs.append(workload.read_metrics(answer) | answer)
            _say(row)


def _measure_servers(
    plan: Plan,
    model: str,
    precision: str,
    entrants: Sequence[Entrant],
    workloads: Sequence[OnlineWorkload],
) -> Iterator[list[Row]]:
    settings = plan.settings(prefix_caching=False)
    servers: dict[Entrant, ServerProcess] = {}
    rows = _empty_rows(model, precision, entrants, workloads)
    with ExitStack() as stack:
        for entrant in entrants:
            try:
                server = ServerProcess(entrant.peer, model, entrant.variant, settings)
                servers[entrant] = stack.enter_context(server)
            except Unavailable as exc:
                _excuse(rows, entrant, exc)
        for workload in workloads:
            for repeat in range(plan.repeats):
                for entrant, server in servers.items():
                    row = rows[workload.name, entrant]
                    if row.reason or is_far_behind(row, _of_workload(rows, workload.name)):
                        continue
                    try:
                        run = partial(server.measure, workload, repeat)
                        row.runs.append(undisturbed(server.pid, run))
                        _say(row)
                    except Unavailable as exc:
                        _excuse({(workload.name, entrant): row}, entrant, exc)
            yield _of_workload(rows, workload.name)


def _empty_rows(
    model: str,
    precision: str,
    entrants: Sequence[Entrant],
    workloads: Sequence[Workload] | Sequence[OnlineWorkload],
) -> dict[tuple[str, Entrant], Row]:
    commit = head_commit()
    return {
        (w.name, e): Row(model, precision, w.name, e.peer.name, e.variant, commit=commit)
        for w in workloads
        for e in entrants
    }


def _of_workload(rows: dict[tuple[str, Entrant], Row], name: str) -> list[Row]:
    return [row for (workload, _), row in rows.items() if workload == name]


def is_far_behind(row: Row, rows: Iterable[Row]) -> bool:
    """Whether a peer has lost against the best of `rows`, one workload's; never ourselves."""
    if row.peer == OURS or not row.runs:
        return False
    share = FAR_BEHIND[min(len(row.runs), max(FAR_BEHIND))]
    for metric in METRICS:
        others = [other.median(metric) or 0.0 for other in rows if other.peer != OURS]
        own = row.median(metric)
        if own is not None and own >= share * max(others):
            return False
    return True


def _excuse(rows: dict[tuple[str, Entrant], Row], entrant: Entrant, why: Unavailable) -> None:
    """The reason why an entrant's cells stay empty."""
    for (workload, other), row in rows.items():
        if other == entrant:
            row.reason = str(why)
            print(f"{row.model} {entrant.name} {workload}: {why}", flush=True)


def _say(row: Row) -> None:
    values = ", ".join(f"{value:,.4g} {name}" for name, value in row.runs[-1].items())
    print(
        f"{row.model} {row.precision} {row.workload} {row.peer} {row.variant}: {values}", flush=True
    )
