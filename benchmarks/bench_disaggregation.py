"""What does it cost to take the model apart? One attention and one expert worker on a core each
(1A1E) against one colocated engine with two threads on the same two cores: as served by default,
where the attention worker computes some experts instead of waiting; and with all on the other.

All are up at the same time and take turns; the idle ones sleep. A batch of random prompts runs to
its end. Reported are medians over interleaved runs, where the time goes, the machine's ceilings,
and the memory of 2 attention and 1 expert worker against two colocated replicas; last line: JSON.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from disaggregation_workers import FIRST_ATTENTION_RANK, WorkerProcess, running

from xdeepserve import envs, store
from xdeepserve.config import ModelConfig
from xdeepserve.launch.compose import load_model_at
from xdeepserve.loadgen.report import json_line, machine_fingerprint
from xdeepserve.models.files.checkpoint_writer import write_hf_folder
from xdeepserve.models.files.safetensors_file import TensorPlan
from xdeepserve.ops.machine import measure_ceilings
from xdeepserve.testing.toy_models import toy_checkpoint

RANDOM_MODEL = "qwen3-moe-0.9b-random"
"""What `--models` calls a qwen3_moe checkpoint of random weights, made when it is not there."""

SETTINGS = COLOCATED, _, _ = "colocated", "1A1E", "1A1E apart"
"""As they are printed; `apart`: the attention worker computes no expert."""


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


def base_order(model: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """What the workers of one setting have in common."""
    return {
        "model": str(model),
        "dtype": dtype,
        "run_id": secrets.token_hex(4),
        "num_microbatches": args.microbatches,
        "share_experts": True,
    }


def compare(model: Path, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model; returns results by batch size, and prints them."""
    base = base_order(model, dtype, args)
    first, second = args.cores
    attention = {**base, "role": "attention", "cores": [first]}
    orders = [
        {**base, "role": "expert", "cores": [second]},
        {**base, "role": "colocated", "cores": [first, second]},
        {**attention, "rank": FIRST_ATTENTION_RANK},
        {**attention, "rank": FIRST_ATTENTION_RANK + 1, "share_experts": False},
    ]
    print(f"{model.name}, {dtype}: output tokens/s, medians of {args.repeats} interleaved runs")
    print(f"{'batch':>6} {'setting':<11}{'tokens/s':>9}{'ratio':>6}  where the time goes")
    results = []
    with running(*orders) as (server, *askers):
        for batch in args.batch:
            workers = dict(zip(SETTINGS, askers, strict=True))
            results.append(
                {"batch": batch, "settings": compare_batch(batch, server, workers, args)}
            )
            print_rows(results[-1])
    return {"dtype": dtype, "batches": results}


def compare_batch(
    batch: int,
    server: WorkerProcess,
    workers: dict[str, WorkerProcess],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All settings in turn, after a warm-up of each that also tunes what is chosen by measuring."""
    order = {"batch": batch, "input_len": args.input_len, "output_len": args.output_len}
    for worker in workers.values():
        worker.ask(**order, salt=f"warm-up {batch}")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for repeat in range(args.repeats):
        for name, worker in workers.items():
            before = server.ask()["stages"].get("expert", 0.0)
            runs[name].append(worker.ask(**order, salt=f"{batch} {repeat}"))
            runs[name][-1]["expert_s"] = server.ask()["stages"].get("expert", 0.0) - before
    return {
        name: summary(found, runs[COLOCATED], batch * args.output_len)
        for name, found in runs.items()
    }


def summary(
    runs: list[dict[str, Any]], colocated: list[dict[str, Any]], num_tokens: int
) -> dict[str, Any]:
    """Medians of one setting's runs, each beside the colocated run of its turn."""
    pairs = list(zip(runs, colocated, strict=True))
    found: dict[str, Any] = {
        "output_tokens_per_s": median(num_tokens / run["seconds"] for run in runs),
        "tpot_ms": median(1e3 * run["tpot_s"] for run in runs),
        "ratio": median(whole["seconds"] / run["seconds"] for run, whole in pairs),
        "decode_ratio": median(whole["tpot_s"] / run["tpot_s"] for run, whole in pairs),
        "stage_share": stage_shares(runs),
        "expert_share": sum(run["expert_s"] for run in runs) / sum(run["seconds"] for run in runs),
    }
    found["balance_bound"] = balance_bound(found)
    return found


def stage_shares(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Share of the runs' time by stage; the rest is scheduling."""
    total = sum(run["seconds"] for run in runs)
    stages = runs[0]["stages"]
    return {stage: sum(run["stages"][stage] for run in runs) / total for stage in stages}


def balance_bound(found: dict[str, Any]) -> float:
    """The ratio if the two workers overlapped completely: the busier one sets the pace.

    Colocated threads share all work evenly; work that belongs to one worker cannot be shared.
    """
    attention = 1.0 - found["stage_share"].get("wait", 0.0)
    expert: float = found["expert_share"]
    return (attention + expert) / (2 * max(attention, expert))


def print_rows(result: dict[str, Any]) -> None:
    """The lines of one batch size."""
    for name, found in result["settings"].items():
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in found["stage_share"].items())
        line = f"{result['batch']:>6} {name:<11}{found['output_tokens_per_s']:>9.1f}"
        line += f"{found['ratio']:>6.2f}  {shares}"
        if name != COLOCATED:
            line += f"; expert worker busy {found['expert_share']:.0%}; "
            line += f"decode only {found['decode_ratio']:.2f}; bound by balance "
            line += f"{found['balance_bound']:.2f}"
        print(line, flush=True)


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
    args = parser.parse_args()
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
        "config": vars(args),
        "machine": machine_fingerprint(),
        "ceilings": [asdict(ceiling) for ceiling in ceilings],
        "results": results,
    }
    print(json_line(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
