"""`xdeepserve bench step`: where each microsecond of a decode step goes.

A fixed batch decodes greedily in the real engine. Counted are the stages of its steps and, within
them, the native operators; what is left over is Python between them. Beside it stands how fast a
step reads what it has to read, and how fast this machine can. The last line is JSON.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.errors import ConfigError
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.launch.compose import add_model_arguments, load
from xdeepserve.launch.flags import config_from_args
from xdeepserve.launch.logs import setup_logging
from xdeepserve.launch.offline import random_requests
from xdeepserve.launch.step_bytes import read_bytes
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.models.decoder import Model
from xdeepserve.ops.cpu import CpuOps
from xdeepserve.ops.machine import Ceilings, measure_ceilings
from xdeepserve.transformerless.stage_times import StageTimes


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Of the mean decode step; microseconds.

    Attributes:
        step_us: the whole step.
        read_bytes: see `step_bytes`.
        stages_us: by stage; what no stage covers is handing outputs over.
        operators_us: by native operator, its thread pool included.
        operator_calls: calls of each in a step.
    """

    batch: int
    num_steps: int
    step_us: float
    read_bytes: int
    stages_us: dict[str, float]
    operators_us: dict[str, float]
    operator_calls: dict[str, float]

    @property
    def outside_us(self) -> float:
        """Time outside operators."""
        return self.step_us - sum(self.operators_us.values())

    @property
    def read_gb_per_s(self) -> float:
        """Of what has to be read; 1e9 bytes per second."""
        return self.read_bytes / self.step_us / 1e3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--steps", type=int, default=64, help="decode steps (default: 64)")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Measure every batch size; prints tables, then one JSON line."""
    setup_logging()
    if min(args.input_len, args.steps, *args.batch) < 1:
        raise ConfigError("--batch, --input-len and --steps must be at least 1")
    config = config_from_args(EngineConfig, args)
    if max(args.batch) > config.max_num_seqs:
        raise ConfigError(
            f"batch={max(args.batch)} does not decode at once with max_num_seqs="
            f"{config.max_num_seqs}; raise --max-num-seqs"
        )
    loaded = load(args)
    ops = loaded.model.ops
    if not isinstance(ops, CpuOps):
        raise ConfigError("`bench step` looks into the cpu backend only; leave out --backend")
    times = StageTimes()
    group = build_dp_group(
        model=loaded.model, model_name=loaded.name, config=config, stage_times=times
    )
    results = [
        measure(
            group, times, loaded.model, batch=batch, input_len=args.input_len, num_steps=args.steps
        )
        for batch in args.batch
    ]
    ceilings = measure_ceilings(ops.num_threads)
    for result in results:
        _print_table(result, ceilings)
    document = {
        "benchmark": "step",
        "model": loaded.name,
        "dtype": group.info.dtype,
        "config": asdict(config_from_args(ModelConfig, args)),
        "input_len": args.input_len,
        "results": [
            asdict(r)
            | {
                "outside_share": r.outside_us / r.step_us,
                "share_of_read_ceiling": r.read_gb_per_s / ceilings.read_gb_per_s,
            }
            for r in results
        ],
        "ceilings": asdict(ceilings),
        "machine": machine_fingerprint(),
    }
    print(json_line(document))
    return 0


def measure(
    group: DPGroup,
    times: StageTimes,
    model: Model,
    *,
    batch: int,
    input_len: int,
    num_steps: int,
) -> StepTimes:
    """Decode `num_steps` steps of a batch, after its prefill and one step to warm up.

    Args:
        group: not started.
        times: the group's stages.
        model: of the group, on the cpu backend.
        batch: requests; at most what the group runs at once.
        input_len: prompt tokens of each.
        num_steps: steps that count.
    """
    requests = random_requests(
        group.info,
        batch=batch,
        input_len=input_len,
        output_len=num_steps + batch + 2,  # the first may decode while the last wait for prefill
        salt="step",
    )
    for request in requests:
        group.submit(request)
    while len(group.step()) < batch:
        pass
    group.step()
    read = read_bytes(model, batch=batch, context=input_len + num_steps // 2)
    result = _decode(group, times, model, batch, num_steps, read)
    for request in requests:
        group.abort(request.request_id)
    group.step()
    return result


def _decode(
    group: DPGroup, times: StageTimes, model: Model, batch: int, num_steps: int, read: int
) -> StepTimes:
    """Times of `num_steps` steps of requests that all decode."""
    ops = model.ops
    assert isinstance(ops, CpuOps), "checked by run"
    before = ops.native.op_times()
    before_s = times.seconds()
    begun_s = SYSTEM_CLOCK.monotonic()
    for _ in range(num_steps):
        group.step()
    step_us = 1e6 * (SYSTEM_CLOCK.monotonic() - begun_s) / num_steps
    stages = {
        str(stage): 1e6 * (seconds - before_s.get(stage, 0.0)) / num_steps
        for stage, seconds in times.seconds().items()
    }
    made = {
        name: (calls - before[name][0], nanos - before[name][1])
        for name, (calls, nanos) in ops.native.op_times().items()
        if calls > before[name][0]
    }
    return StepTimes(
        batch=batch,
        num_steps=num_steps,
        step_us=step_us,
        read_bytes=read,
        stages_us=stages,
        operators_us={name: nanos / 1e3 / num_steps for name, (_, nanos) in made.items()},
        operator_calls={name: calls / num_steps for name, (calls, _) in made.items()},
    )


def _print_table(result: StepTimes, ceilings: Ceilings) -> None:
    """Stages in order, then operators by time."""
    print(f"batch {result.batch}: {result.step_us:.0f} us a step, mean of {result.num_steps}")
    for stage, micros in result.stages_us.items():
        print(f"  stage    {stage:<18}{micros:>10.1f} us{micros / result.step_us:>8.1%}")
    for name, micros in sorted(result.operators_us.items(), key=lambda item: -item[1]):
        print(
            f"  operator {name:<18}{micros:>10.1f} us{micros / result.step_us:>8.1%}"
            f"{result.operator_calls[name]:>7.0f} calls"
        )
    share = result.outside_us / result.step_us
    print(f"  outside operators         {result.outside_us:>11.1f} us{share:>8.1%}")
    of_ceiling = result.read_gb_per_s / ceilings.read_gb_per_s
    print(
        f"  read {result.read_bytes / 1e6:.1f} MB a step: {result.read_gb_per_s:.1f} GB/s, "
        f"{of_ceiling:.0%} of the {ceilings.read_gb_per_s:.1f} GB/s of this machine",
        flush=True,
    )
