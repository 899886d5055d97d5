"""A DP group over a toy model in a process of its own: `python -m tests.multiproc.dp_worker`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import time
from pathlib import Path

from tests.toys import toy_model
from xdeepserve.config import EngineConfig
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.dp_server import DPServer
from xdeepserve.flowserve.executor import Executor
from xdeepserve.flowserve.step import StepPlan, StepResult

TOY = ("glm4_moe", "bf16", "cpu", 1)
CONFIG = EngineConfig(max_num_seqs=16, max_num_batched_tokens=512, block_size=8, num_kv_blocks=1024)


def make_group() -> DPGroup:
    """The group that every worker runs, and that the undisturbed run uses."""
    return build_dp_group(model=toy_model(*TOY), model_name="toy", config=CONFIG)


class SlowExecutor:
    """An executor whose steps last long enough to be interrupted."""

    def __init__(self, executor: Executor, step_s: float) -> None:
        self._executor = executor
        self._step_s = step_s
        self.warm_up, self.close = executor.warm_up, executor.close

    def execute(self, *, plan: StepPlan) -> StepResult:
        time.sleep(self._step_s)
        return self._executor.execute(plan=plan)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--step-s", type=float, default=0.0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    group = make_group()
    group._executor = SlowExecutor(group._executor, args.step_s)
    asyncio.run(serve(group, args.path))


async def serve(group: DPGroup, path: Path) -> None:
    """Until SIGTERM."""
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    server = DPServer(group, path)
    await server.start()
    await ending.wait()
    await server.close(drain_timeout_s=0.0)


if __name__ == "__main__":
    main()
