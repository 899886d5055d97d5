"""llama.cpp as a worker: its own `llama-batched-bench` for every order.

The tool draws its prompts itself, and neither samples nor detokenizes, which is in its favour; so
is a shared prefix that is the whole prompt.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import protocol

BATCH, MICROBATCH = 2048, 512


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, float]]:
    """Nothing is kept loaded: the tool loads the model for each order, outside its times."""
    base = [settings["tool"], "-m", settings["model"], "-t", str(settings["threads"])]
    base += ["-b", str(BATCH), "-ub", str(MICROBATCH), "-fa", "on", "--output-format", "jsonl"]

    def run(order: dict[str, Any]) -> dict[str, float]:
        batch, input_len = len(order["prompts"]), len(order["prompts"][0])
        output_len = order["output_len"]
        context = batch * (input_len + output_len) + 256
        command = [*base, "-c", str(context), "-npp", str(input_len), "-ntg", str(output_len)]
        command += ["-npl", str(batch)] + (["-pps"] if order["shared_len"] else [])
        done = subprocess.run(command, capture_output=True, text=True)
        rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0 or not rows:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
        row = json.loads(rows[-1])
        return {
            "seconds": row["t_pp"] + row["t_tg"],
            "ttft_s": row["t_pp"],
            "tpot_s": row["t_tg"] / output_len,
        }

    return run


if __name__ == "__main__":
    protocol.serve(start)
