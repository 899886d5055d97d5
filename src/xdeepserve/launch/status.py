"""`xdeepserve status`: the workers of a running service, or its experts, as a table or as JSON."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterable, Mapping

import msgspec

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.launch.placement import Placement, experts_of
from xdeepserve.launch.plan import WorkerSpec, worker_name
from xdeepserve.launch.run_dir import choose_run
from xdeepserve.launch.service import ServiceConfig, load_service
from xdeepserve.launch.supervisor.client import status_of
from xdeepserve.launch.supervisor.messages import ExpertHeat, HotExpert, LayerHeat, Member, Status
from xdeepserve.messages import Heartbeat

COLUMNS = (
    *("WORKER", "ROLE", "STATE", "PID", "INC", "RESTARTS", "UPTIME"),
    *("EXPERTS", "LOAD", "TIME", "NOTE"),
)

NUM_STAGES = 3
"""Of a worker's loop that are shown, longest first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-id", metavar="ID", help="which service, where several run here")
    parser.add_argument(
        "--experts", action="store_true", help="show each layer's experts and workers instead"
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Print the status; 0 when all workers can serve, 1 when some cannot."""
    run_dir = choose_run(args.run_id)
    status = asyncio.run(status_of(run_dir))
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(status)).decode())
    elif args.experts:
        print("\n".join(render_experts(status.expert_heat)))
    else:
        print("\n".join(render(status, load_service(run_dir), SYSTEM_CLOCK.wall())))
    return 0 if all(member.can_serve for member in status.membership.members) else 1


def render(status: Status, service: ServiceConfig, now_s: float) -> list[str]:
    """The lines of the table, with a header about the run."""
    membership, slo = status.membership, service.deployment.slo
    counts = " ".join(f"{role}={count}" for role, count in membership.counts.items())
    head = (
        f"run {membership.run_id}  model {service.model_name}  {counts}  "
        f"epoch {membership.epoch}  supervisor {status.supervisor.pid}  "
        f"SLO ttft {_target(slo.ttft_ms)}, tpot {_target(slo.tpot_ms)}"
    )
    rows = [
        _row(m, status.heartbeats.get(m.name), membership.placement, now_s)
        for m in membership.members
    ]
    heat = [] if status.expert_heat is None else [_heat(status.expert_heat)]
    return [head, *heat, *_align([COLUMNS, *rows])]


def _target(milliseconds: float) -> str:
    return f"{milliseconds:g} ms" if milliseconds else "none"


def render_experts(heat: ExpertHeat | None) -> list[str]:
    """The heat, and by layer: load of each worker over the mean, and the hottest experts."""
    if heat is None:
        return ["this service has no expert workers; its DP groups compute the experts"]
    if not heat.layers:
        return [_heat(heat), "no tokens of late"]
    names = [worker_name("expert", rank).upper() for rank in heat.rank_ratios]
    columns = ("LAYER", "TOKENS", "PEAK/MEAN", *names, "HOTTEST EXPERTS (SHARE, WORKERS)")
    ratios = [f"{ratio:.2f}" for ratio in heat.rank_ratios.values()]
    total = ("all", str(heat.num_tokens), f"{heat.peak_over_mean:.2f}", *ratios, "")
    return [_heat(heat), *_align([columns, total, *(_layer_row(layer) for layer in heat.layers)])]


def _layer_row(layer: LayerHeat) -> tuple[str, ...]:
    ratios = layer.rank_ratios.values()
    return (
        str(layer.layer_idx),
        str(layer.num_tokens),
        f"{max(ratios):.2f}",
        *(f"{ratio:.2f}" for ratio in ratios),
        "  ".join(_hot(expert) for expert in layer.hottest),
    )


def _hot(expert: HotExpert) -> str:
    """Such as "7 (31% on 0,2)"."""
    return f"{expert.expert} ({expert.share:.0%} on {','.join(map(str, expert.ranks))})"


def _heat(heat: ExpertHeat) -> str:
    """One line: how evenly the experts are loaded, and what was done about it."""
    words = [f"experts: placement {heat.placement_epoch}"]
    if heat.hottest is not None:
        layer_idx, expert = heat.hottest
        words += [
            f"peak/mean {heat.peak_over_mean:.2f}",
            f"hottest: expert {expert} of layer {layer_idx} with {heat.hottest_share:.0%}",
        ]
    words.append(f"{heat.num_moves} moves in {heat.num_migrations} migrations")
    if heat.is_migrating:
        words.append("migrating now")
    return "  ".join(words)


def _row(
    member: Member, heartbeat: Heartbeat | None, placement: Placement | None, now_s: float
) -> tuple[str, ...]:
    alive = member.process is not None
    load = {} if heartbeat is None else heartbeat.load
    stages = {} if heartbeat is None else heartbeat.stage_s
    return (
        member.name,
        member.spec.role,
        member.state.value,
        str(member.process.pid) if member.process is not None else "-",
        str(member.incarnation),
        str(member.num_restarts),
        _duration(now_s - member.started_at_s) if alive else "-",
        _experts(member.spec, placement),
        " ".join(f"{name}={value:g}" for name, value in load.items()) or "-",
        _shares(stages) or "-",
        member.reason or "-",
    )


def _experts(spec: WorkerSpec, placement: Placement | None) -> str:
    """How many experts a worker holds by the placement in force: "4/layer" or "3-5/layer"."""
    if spec.role != "expert" or placement is None or spec.rank not in placement.expert:
        return "-"
    counts = [len(experts) for experts in experts_of(placement, spec.rank)]
    least, most = min(counts), max(counts)
    return f"{least}/layer" if least == most else f"{least}-{most}/layer"


def _shares(stages: Mapping[str, float]) -> str:
    """Where the time of the loop has gone, in percent."""
    total_s = sum(stages.values())
    longest = sorted(stages, key=lambda stage: -stages[stage])[:NUM_STAGES]
    return " ".join(f"{stage} {stages[stage] / total_s:.0%}" for stage in longest if total_s)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def _align(rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
