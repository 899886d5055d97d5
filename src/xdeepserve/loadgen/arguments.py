"""The flags of `bench serve` and `chat`, and the records that they turn into."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.bench_serve import BenchConfig
from xdeepserve.loadgen.metrics import parse_slo
from xdeepserve.loadgen.runner import Limit
from xdeepserve.loadgen.slo_search import SearchConfig
from xdeepserve.loadgen.workload import (
    DEFAULT_TOKEN_RANGE,
    LengthDistribution,
    WorkloadConfig,
    read_dataset,
)

T = TypeVar("T")

DEFAULT_URL: Final = "http://127.0.0.1:8000"
DEFAULT_CONCURRENCY: Final = 16
DEFAULT_WAVES: Final = 4
DEFAULT_OPEN_LOOP_PROMPTS: Final = 100
DEFAULT_WARMUPS: Final = 4


def _parsed_by(parse: Callable[[str], T]) -> Callable[[str], T]:
    """`parse` as an argparse type: its ConfigError becomes a usage error."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except ConfigError as exc:
            raise argparse.ArgumentTypeError(exc.message) from exc

    return convert


def _token_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise ConfigError(f"token range {text!r} must be LOW:HIGH with 0 <= LOW < HIGH")
    return int(low), int(high)


def _json_object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as exc:
        raise ConfigError(f"{text!r} is not a JSON object: {exc}") from exc


def _positive_int(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _add_server_arguments(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument("--url", default=DEFAULT_URL, help="base URL (default: %(default)s)")
    server.add_argument("--model", help="model name (default: the first one the server lists)")
    server.add_argument("--api-key", help="sent as bearer token")


def add_bench_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench serve` to `parser`."""
    _add_server_arguments(parser)
    _add_workload_arguments(parser)
    _add_load_arguments(parser)
    _add_search_arguments(parser)


def _add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "workload", "LENGTH is N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA (sigma of the logarithm)"
    )
    length = _parsed_by(LengthDistribution.parse)
    group.add_argument(
        "--endpoint",
        choices=("completions", "chat"),
        default="completions",
        help="completions sends token ids, chat sends English words (default: %(default)s)",
    )
    for flag, meaning in (("--input-len", "prompt"), ("--output-len", "output")):
        group.add_argument(
            flag, type=length, default="128", metavar="LENGTH", help=f"{meaning} tokens"
        )
    group.add_argument(
        "--dataset",
        type=Path,
        metavar="FILE",
        help='JSONL rows {"output_len": N, "input_len": N} or {"output_len": N, "prompt": ...}',
    )
    group.add_argument(
        "--shared-prefix-len",
        type=int,
        default=0,
        metavar="N",
        help="this many leading prompt tokens are the same in all requests (default: 0)",
    )
    group.add_argument(
        "--token-range",
        type=_parsed_by(_token_range),
        default=DEFAULT_TOKEN_RANGE,
        metavar="LOW:HIGH",
        help="draw prompt token ids from [LOW, HIGH); must fit the vocabulary (default: 256:8192)",
    )
    group.add_argument(
        "--no-ignore-eos",
        dest="ignore_eos",
        action="store_false",
        help="let the model end its answers (for servers that do not know ignore_eos)",
    )
    group.add_argument(
        "--seed",
        type=int,
        help="same seed, same prompts; a second run then hits the prefix cache (default: random)",
    )
    group.add_argument(
        "--extra-body",
        type=_parsed_by(_json_object),
        default={},
        metavar="JSON",
        help="fields added to every request",
    )


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    loop = group.add_mutually_exclusive_group()
    positive = _parsed_by(_positive_int)
    loop.add_argument(
        "--concurrency",
        type=positive,
        metavar="N",
        help=f"closed loop: N requests under way at any time (default: {DEFAULT_CONCURRENCY})",
    )
    loop.add_argument(
        "--request-rate", type=float, metavar="R", help="open loop: R arrivals per second"
    )
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="open loop: 1 = Poisson, below burstier, above more even (default: 1)",
    )
    group.add_argument(
        "--num-prompts",
        type=positive,
        metavar="N",
        help="requests (default: the dataset's rows, 4 x concurrency, or 100 in the open loop)",
    )
    group.add_argument("--duration", type=float, metavar="S", help="stop sending after S seconds")
    group.add_argument(
        "--num-warmups",
        type=int,
        default=DEFAULT_WARMUPS,
        metavar="N",
        help="unmeasured requests before (default: 4)",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="METRIC:MS",
        help="count requests within these limits, e.g. ttft:500 tpot:50 e2e:8000",
    )
    group.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="longest wait for a first token"
    )


def _add_search_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "search", "closed-loop probes: double the concurrency until the SLO breaks, then bisect"
    )
    positive = _parsed_by(_positive_int)
    group.add_argument(
        "--tpot-slo-ms",
        type=float,
        metavar="MS",
        help="find the highest output rate whose mean TPOT is at most MS",
    )
    group.add_argument(
        "--max-concurrency", type=positive, default=256, help="never beyond (default: %(default)s)"
    )
    group.add_argument(
        "--waves",
        type=positive,
        default=DEFAULT_WAVES,
        help="requests per probe, as a multiple of its concurrency (default: %(default)s)",
    )


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `chat` to `parser`."""
    _add_server_arguments(parser)
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", default="", help="system prompt")
    group.add_argument("--max-tokens", type=_parsed_by(_positive_int), help="longest answer")
    group.add_argument("--temperature", type=float, help="0 = greedy (default: the server's)")
    group.add_argument("--seed", type=int, help="makes sampling repeatable")


def chat_options(args: argparse.Namespace) -> dict[str, Any]:
    """Sampling fields that the user set."""
    names = ("max_tokens", "temperature", "seed")
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _workload_config(args: argparse.Namespace) -> WorkloadConfig:
    return WorkloadConfig(
        endpoint=args.endpoint,
        input_len=args.input_len,
        output_len=args.output_len,
        dataset=tuple(read_dataset(args.dataset)) if args.dataset else (),
        shared_prefix_len=args.shared_prefix_len,
        token_range=args.token_range,
        ignore_eos=args.ignore_eos,
        seed=random.randrange(1 << 31) if args.seed is None else args.seed,
        extra_body=args.extra_body,
    )


def bench_config(args: argparse.Namespace) -> BenchConfig:
    """The single run that the flags ask for.

    Raises:
        ConfigError: flags that contradict each other, or an unreadable dataset.
    """
    workload = _workload_config(args)
    concurrency = args.concurrency
    if concurrency is None and args.request_rate is None:
        concurrency = DEFAULT_CONCURRENCY
    num_prompts = args.num_prompts
    if num_prompts is None and args.duration is None:
        closed_loop = DEFAULT_WAVES * concurrency if concurrency else DEFAULT_OPEN_LOOP_PROMPTS
        num_prompts = len(workload.dataset) or closed_loop
    return BenchConfig(
        workload=workload,
        limit=Limit(num_prompts, args.duration),
        concurrency=concurrency,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        num_warmups=args.num_warmups,
        slo_ms=parse_slo(args.goodput),
    )


def search_config(args: argparse.Namespace) -> SearchConfig | None:
    """The SLO search that the flags ask for; None when they ask for a single run.

    Raises:
        ConfigError: as `bench_config`, and for flags that a search sets itself.
    """
    if args.tpot_slo_ms is None:
        return None
    single_run = ("concurrency", "request_rate", "num_prompts", "duration")
    for name in (name for name in single_run if getattr(args, name) is not None):
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"--tpot-slo-ms searches by itself; remove {flag}")
    return SearchConfig(
        bench=bench_config(args),
        tpot_slo_ms=args.tpot_slo_ms,
        max_concurrency=args.max_concurrency,
        waves=args.waves,
    )
