"""What does it cost to take the model apart? One attention and one expert worker on a core each
(1A1E) against one colocated engine with two threads on the same two cores.

Both are up at the same time and take turns; the idle one sleeps. A batch of random prompts runs to
its end. Reported are medians over interleaved runs, where the time goes, the machine's ceilings,
and the memory of 2 attention and 1 expert worker against two colocated replicas; last line: JSON.
"""

# size: a worker and its control read together; two files would need a third for what they share

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from xdeepserve import envs, store
from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.launch.compose import load_model_at
from xdeepserve.launch.offline import run_batch
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.models.files.checkpoint_writer import write_hf_folder
from xdeepserve.models.files.safetensors_file import TensorPlan
from xdeepserve.ops.machine import measure_ceilings
from xdeepserve.testing.toy_models import toy_checkpoint
from xdeepserve.transformerless.module_server import ModuleServer
from xdeepserve.transformerless.partition import partition
from xdeepserve.transformerless.routing import LiveRouting, RoutingTable
from xdeepserve.transformerless.stage_times import StageTimes
from xdeepserve.transformerless.xccl_transport import XcclTransport
from xdeepserve.xccl import Layout, Port

RANDOM_MODEL = "qwen3-moe-0.9b-random"
"""What `--models` calls a qwen3_moe checkpoint of random weights, made when it is not there."""

EXPERT_RANK, FIRST_ATTENTION_RANK, MAX_RANKS = 0, 1, 4


def random_model() -> Path:
    """The folder of RANDOM_MODEL: 20 layers of 32 experts, 4 a token, 0.9 billion parameters."""
    folder = envs.HOME.get() / "models" / RANDOM_MODEL
    if folder.exists():
        return folder
    checkpoint = toy_checkpoint(
        "qwen3_moe", vocab_size=32000, hidden_size=1024, num_hidden_layers=20, head_dim=64,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=4096,
        num_experts=32, num_experts_per_tok=4, moe_intermediate_size=384,
        decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=True,
    )  # fmt: skip
    plans = [
        TensorPlan(name, shape, partial(checkpoint.tensor, name))
        for name, shape in checkpoint.shapes.items()
    ]
    print(f"writing {folder}", flush=True)
    write_hf_folder(folder, config=checkpoint.config, tensors=plans, files={})
    return folder


# -- inside a worker -------------------------------------------------------------------------------


class Worker:
    """One process of a setting; obeys commands, one JSON object a line."""

    def __init__(self, order: dict[str, Any]) -> None:
        os.sched_setaffinity(0, order["cores"])
        self._order = order
        self._times = StageTimes()
        precision = ModelConfig(dtype=order["dtype"], num_threads=len(order["cores"]))
        self._model = load_model_at(Path(order["model"]), precision)

    def port(self, rank: int) -> Port:
        """The port of a rank of this setting's run."""
        moe = self._model.spec.moe
        assert moe is not None, "the benchmark serves MoE models"
        layout = Layout.for_rows(
            max_ranks=MAX_RANKS,
            max_rows=EngineConfig().max_num_batched_tokens,
            hidden_size=self._model.spec.hidden_size,
            top_k=moe.gate.top_k,
        )
        return Port(self._order["run_id"], f"r{rank}", rank, layout=layout)

    def serve_experts(self) -> None:
        """Be the expert worker until the process is killed; tells its stage times when asked."""
        units = partition(self._model)
        server = ModuleServer(self.port(EXPERT_RANK), units, stage_times=self._times)
        threading.Thread(target=server.run, daemon=True).start()
        say({"ready": True})
        for _ in sys.stdin:
            say({"stages": self._times.seconds()})

    def _group(self) -> DPGroup:
        name, rank = self._model.spec.family, self._order.get("rank")
        if rank is None:
            return build_dp_group(
                model=self._model,
                model_name=name,
                config=EngineConfig(),
                stage_times=self._times,
            )
        transport = XcclTransport(
            port=self.port(rank),
            units=partition(self._model),
            routing=LiveRouting(self._table()),
            stage_times=self._times,
        )
        return build_dp_group(
            model=self._model,
            model_name=name,
            config=EngineConfig(num_microbatches=self._order["num_microbatches"]),
            transport=transport,
            stage_times=self._times,
        )

    def _table(self) -> RoutingTable:
        moe, num_layers = self._model.spec.moe, self._model.spec.num_layers
        assert moe is not None, "the benchmark serves MoE models"
        experts = list(range(moe.gate.num_experts))
        return RoutingTable.build(
            [experts] * num_layers, num_experts=len(experts), expert_ranks=[EXPERT_RANK]
        )

    def serve_attention(self) -> None:
        """Be a DP group: run the batches asked for on stdin."""
        group = self._group()
        say({"ready": True})
        for line in sys.stdin:
            order = json.loads(line)
            before = self._times.seconds()
            seconds, timelines = run_batch(group, **order)
            stages = {
                stage.value: total - before.get(stage, 0.0)
                for stage, total in self._times.seconds().items()
            }
            tpot = fmean(t.tpot_s or 0.0 for t in timelines)
            say({"seconds": seconds, "tpot_s": tpot, "stages": stages})


def say(answer: dict[str, Any]) -> None:
    """One line for the controlling process."""
    print(json.dumps(answer), flush=True)


def work(order: dict[str, Any]) -> None:
    """Entry of a worker process."""
    worker = Worker(order)
    if order["role"] == "expert":
        worker.serve_experts()
    else:
        worker.serve_attention()


# -- in control ------------------------------------------------------------------------------------


class WorkerProcess:
    """A worker as the controlling process sees it."""

    def __init__(self, order: dict[str, Any]) -> None:
        command = [sys.executable, __file__, "--worker", json.dumps(order)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and wait for the answer."""
        assert self.process.stdin is not None, "opened as a pipe"
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None, "opened as a pipe"
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def pss_mib(self) -> float:
        """Proportional set size: shared pages are counted in parts that add up."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        (line,) = (line for line in text.splitlines() if line.startswith("Pss:"))
        return int(line.split()[1]) / 1024

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def running(*orders: dict[str, Any]) -> Iterator[list[WorkerProcess]]:
    """Workers that are ready; killed afterwards, their segments unlinked."""
    with ExitStack() as stack:
        workers = []
        for order in orders:
            worker = WorkerProcess(order)
            stack.callback(worker.stop)
            workers.append(worker)
        for worker in workers:
            worker.answer()
        yield workers
    for path in Path("/dev/shm").glob(f"xds-{orders[0]['run_id']}-*"):
        path.unlink()


def base_order(model: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the workers of one setting have in common."""
    return {
        "model": str(model),
        "dtype": dtype,
        "run_id": secrets.token_hex(4),
        "num_microbatches": args.microbatches,
    }


def compare(model: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model; returns results by batch size, and prints them."""
    base = base_order(model, dtype, args)
    first, second = args.cores
    colocated = {**base, "role": "colocated", "cores": [first, second]}
    attention = {**base, "role": "attention", "cores": [first], "rank": FIRST_ATTENTION_RANK}
    expert = {**base, "role": "expert", "cores": [second]}
    print(f"{model.name}, {dtype}: output tokens/s, medians of {args.repeats} interleaved runs")
    print(f"{'batch':>6}{'colocated':>11}{'1A1E':>8}{'ratio':>7}  where the time of 1A1E goes")
    results = []
    with running(expert, attention, colocated) as (server, split, whole):
        for batch in args.batch:
            before = server.ask()["stages"].get("expert", 0.0)
            results.append(compare_batch(batch, split, whole, args))
            computed_s = server.ask()["stages"]["expert"] - before
            results[-1]["expert_share"] = computed_s / results[-1].pop("split_seconds")
            results[-1]["balance_bound"] = balance_bound(results[-1])
            print_row(results[-1])
    return {"dtype": dtype, "batches": results}


def compare_batch(
    batch: int, split: WorkerProcess, whole: WorkerProcess, args: argparse.Namespace
) -> dict[str, Any]:
    """Both settings in turn, after a warm-up of each that also tunes the microbatches."""
    order = {"batch": batch, "input_len": args.input_len, "output_len": args.output_len}
    split_seconds = 0.0
    for worker in (split, whole):
        warm_up = worker.ask(**order, salt=f"warm-up {batch}")
        split_seconds = split_seconds or warm_up["seconds"]
    runs: dict[str, list[dict[str, Any]]] = {"1A1E": [], "colocated": []}
    for repeat in range(args.repeats):
        runs["1A1E"].append(split.ask(**order, salt=f"{batch} {repeat}"))
        runs["colocated"].append(whole.ask(**order, salt=f"{batch} {repeat}"))
    num_tokens = batch * args.output_len
    rates = {name: [num_tokens / run["seconds"] for run in found] for name, found in runs.items()}
    tpots = {name: [1e3 * run["tpot_s"] for run in found] for name, found in runs.items()}
    ratios = [a / b for a, b in zip(rates["1A1E"], rates["colocated"], strict=True)]
    tpot_ratios = [b / a for a, b in zip(tpots["1A1E"], tpots["colocated"], strict=True)]
    return {
        "batch": batch,
        "split_seconds": split_seconds + sum(run["seconds"] for run in runs["1A1E"]),
        "output_tokens_per_s": {name: median(found) for name, found in rates.items()},
        "ratio": median(ratios),
        "tpot_ms": {name: median(found) for name, found in tpots.items()},
        "decode_ratio": median(tpot_ratios),
        "stage_share": stage_shares(runs["1A1E"]),
        "colocated_stage_share": stage_shares(runs["colocated"]),
    }


def stage_shares(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the runs' time by stage; the rest is scheduling."""
    total = sum(run["seconds"] for run in runs)
    stages = runs[0]["stages"]
    return {stage: sum(run["stages"][stage] for run in runs) / total for stage in stages}


def balance_bound(result: dict[str, Any]) -> float:
    """The ratio if the two workers overlapped completely: the busier one sets the pace.

    Colocated threads share all work evenly; work that belongs to one worker cannot be shared.
    """
    attention = 1.0 - result["stage_share"]["wait"]
    expert: float = result["expert_share"]
    return (attention + expert) / (2 * max(attention, expert))


def print_row(result: dict[str, Any]) -> None:
    """One line of the table."""
    rates = result["output_tokens_per_s"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in result["stage_share"].items())
    print(
        f"{result['batch']:>6}{rates['colocated']:>11.1f}{rates['1A1E']:>8.1f}"
        f"{result['ratio']:>7.2f}  {shares}; expert busy {result['expert_share']:.0%}; "
        f"decode only: {result['decode_ratio']:.2f}; bound by balance: "
        f"{result['balance_bound']:.2f}",
        flush=True,
    )


def compare_memory(model: Path, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    """MiB of 2A + 1E and of two colocated replicas, after one batch on each."""
    order = {"batch": 8, "input_len": args.input_len, "output_len": 8, "salt": "memory"}
    found = {}
    for name, roles in (
        ("2A1E", ("expert", "attention", "attention")),
        ("2 colocated", ("colocated",) * 2),
    ):
        base = base_order(model, dtype, args)
        orders = []
        for idx, role in enumerate(roles):
            rank = {"rank": idx} if role == "attention" else {}
            orders.append({**base, "role": role, "cores": args.cores, **rank})
        with running(*orders) as workers:
            for worker, role in zip(workers, roles, strict=True):
                if role != "expert":
                    worker.ask(**order)
            found[name] = sum(worker.pss_mib() for worker in workers)
    print("memory (PSS, MiB): " + ", ".join(f"{name} {mib:.0f}" for name, mib in found.items()))
    return found


def main() -> int:
    """Measure every model and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-moe8", RANDOM_MODEL])
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=0, help="0 = by measured times")
    parser.add_argument("--cores", type=int, nargs=2, default=sorted(os.sched_getaffinity(0))[:2])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(json.loads(args.worker))
        return 0
    results = {}
    for name in args.models:
        model = random_model() if name == RANDOM_MODEL else store.resolve(name)
        load_model_at(model, ModelConfig(dtype=args.dtype))  # packed once, before it is measured
        results[name] = compare(model, args.dtype, args)
        results[name]["memory_mib"] = compare_memory(model, args.dtype, args)
    ceilings = [measure_ceilings(num_threads) for num_threads in (1, 2)]
    for ceiling in ceilings:
        print(f"ceiling: {ceiling}")
    document = {
        "benchmark": "disaggregation",
        "config": {key: value for key, value in vars(args).items() if key != "worker"},
        "machine": machine_fingerprint(),
        "ceilings": [asdict(ceiling) for ceiling in ceilings],
        "results": results,
    }
    print(json_line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
