"""`/metrics` of the real services names every worker and the stages of its time."""

from __future__ import annotations

import re
import time
import urllib.request

import pytest
from openai import OpenAI

from tests.multiproc.cluster_harness import run_folder
from xdeepserve.launch.server_process import ServerProcess

pytestmark = [pytest.mark.weights, pytest.mark.slow]

MODEL = "smollm2-135m-moe8"
STAGE = re.compile(
    r'^xdeepserve:worker_stage_seconds_total\{role="\w+",stage="(\w+)",worker="(\w+)"\} (\S+)$'
)
DEADLINE_S = 10.0


def ask(server: ServerProcess) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        client.completions.create(model=server.model, prompt="The sea", max_tokens=4)


def stages_of(server: ServerProcess) -> dict[tuple[str, str], float]:
    """Seconds by worker and stage."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=5) as answer:
        found = [STAGE.match(line) for line in answer.read().decode().splitlines()]
    return {(m[2], m[1]): float(m[3]) for m in found if m is not None}


def test_colocated(server: ServerProcess) -> None:
    ask(server)
    stages = stages_of(server)
    of_loop = {"schedule", "inputs", "update"}
    assert set(stages) == {("dp0", s) for s in of_loop | {"layers", "head", "sample"}}
    assert all(seconds > 0 for seconds in stages.values())


def test_taken_apart() -> None:
    expected = {("expert0", "expert"), ("expert0", "poll"), ("dp0", "wait"), ("dp0", "combine")}
    with run_folder(), ServerProcess(MODEL, "--attention", "1", "--expert", "1") as server:
        ask(server)
        deadline_s = time.monotonic() + DEADLINE_S
        while not expected <= set(stages_of(server)):
            assert time.monotonic() < deadline_s, stages_of(server)
