"""`xdeepserve bench offline`: the engine alone, a fixed batch of random prompts, greedy, no HTTP.

All requests are there at the start; each produces exactly `output_len` tokens. Reported per batch
size: output and total tokens per second, TTFT of the batch and mean TPOT. The last line is JSON.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict, dataclass
from statistics import fmean, median

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.errors import ConfigError, EngineDeadError
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.launch.compose import add_model_arguments, load
from xdeepserve.launch.flags import config_from_args
from xdeepserve.launch.logs import setup_logging
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.messages import EngineInfo, FinishReason, GenerateRequest, SamplingParams
from xdeepserve.ops.machine import measure_ceilings
from xdeepserve.telemetry import RequestTimeline


@dataclass(frozen=True, slots=True)
class BatchResult:
    """Medians over the repeats of one batch size."""

    batch: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    mean_ttft_ms: float
    mean_tpot_ms: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="batch sizes")
    parser.add_argument("--input-len", type=int, default=128, help="prompt tokens (default: 128)")
    parser.add_argument("--output-len", type=int, default=128, help="output tokens (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="runs per batch size (default: 3)")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Measure every batch size; prints a table, then one JSON line."""
    setup_logging()
    for name in ("input_len", "output_len", "repeats"):
        if getattr(args, name) < 1:
            raise ConfigError(f"{name}={getattr(args, name)} must be at least 1")
    if min(args.batch) < 1:
        raise ConfigError(f"batch={min(args.batch)} must be at least 1")
    group = _build(args)
    print(f"{'batch':>6}{'output tok/s':>14}{'total tok/s':>14}{'TTFT ms':>10}{'TPOT ms':>10}")
    results = []
    for batch in args.batch:
        run_batch(group, batch=batch, input_len=args.input_len, output_len=2, salt="warm-up")
        result = _measure(group, batch, args)
        results.append(result)
        print(
            f"{batch:>6}{result.output_tokens_per_s:>14.1f}{result.total_tokens_per_s:>14.1f}"
            f"{result.mean_ttft_ms:>10.1f}{result.mean_tpot_ms:>10.2f}",
            flush=True,
        )
    _print_document(group, args, results)
    return 0


def _build(args: argparse.Namespace) -> DPGroup:
    config = config_from_args(EngineConfig, args)
    loaded = load(args)
    return build_dp_group(model=loaded.model, model_name=loaded.name, config=config)


def _measure(group: DPGroup, batch: int, args: argparse.Namespace) -> BatchResult:
    runs = [
        run_batch(
            group,
            batch=batch,
            input_len=args.input_len,
            output_len=args.output_len,
            salt=str(repeat),
        )
        for repeat in range(args.repeats)
    ]
    num_output = batch * args.output_len
    num_total = num_output + batch * args.input_len
    seconds = median(duration_s for duration_s, _ in runs)
    ttfts = [t.ttft_s or 0.0 for _, timelines in runs for t in timelines]
    tpots = [t.tpot_s or 0.0 for _, timelines in runs for t in timelines]
    return BatchResult(
        batch, num_output / seconds, num_total / seconds, fmean(ttfts) * 1e3, fmean(tpots) * 1e3
    )


def run_batch(
    group: DPGroup, *, batch: int, input_len: int, output_len: int, salt: str
) -> tuple[float, list[RequestTimeline]]:
    """Run one batch of random prompts to its end, greedily; returns its seconds and timelines.

    Each run has its own cache salt, so nothing is served from the prefix cache of an earlier one.

    Raises:
        EngineDeadError: a request failed.
    """
    requests = random_requests(
        group.info, batch=batch, input_len=input_len, output_len=output_len, salt=salt
    )
    start_s = SYSTEM_CLOCK.monotonic()
    timelines = {r.request_id: RequestTimeline(arrived_s=start_s) for r in requests}
    for request in requests:
        group.submit(request)
    num_left = batch
    while num_left:
        outputs = group.step()
        now_s = SYSTEM_CLOCK.monotonic()
        for output in outputs:
            timelines[output.request_id].on_tokens(now_s=now_s, count=len(output.token_ids))
            if output.finish_reason is FinishReason.ERROR:
                raise EngineDeadError(output.error or "the engine failed")
            num_left -= output.finish_reason is not None
    return SYSTEM_CLOCK.monotonic() - start_s, list(timelines.values())


def random_requests(
    info: EngineInfo, *, batch: int, input_len: int, output_len: int, salt: str
) -> list[GenerateRequest]:
    """Greedy requests with random prompts, which differ by `salt` and share no cache with others.

    Args:
        info: of the engine that they are for.
        batch: how many.
        input_len: prompt tokens of each.
        output_len: tokens that each generates, whatever they are.
        salt: begins their ids.
    """
    rng = random.Random(f"{batch} {salt}")
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    return [
        GenerateRequest(
            request_id=f"{salt}-{idx}",
            prompt_token_ids=rng.choices(range(info.vocab_size), k=input_len),
            params=params,
            cache_salt=salt,
        )
        for idx in range(batch)
    ]


def _print_document(group: DPGroup, args: argparse.Namespace, results: list[BatchResult]) -> None:
    document = {
        "benchmark": "offline",
        "model": group.info.model,
        "dtype": group.info.dtype,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "repeats": args.repeats,
        "config": {
            "model": asdict(config_from_args(ModelConfig, args)),
            "engine": asdict(config_from_args(EngineConfig, args)),
        },
        "results": [asdict(result) for result in results],
        "ceilings": asdict(measure_ceilings(config_from_args(ModelConfig, args).num_threads)),
        "machine": machine_fingerprint(),
    }
    print(json_line(document))
