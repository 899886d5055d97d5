"""Worker processes of bench_disaggregation: what they are, and how they are ordered about.

As a program: one worker, which obeys commands on stdin, one JSON object a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from xdeepserve.config import EngineConfig, ModelConfig
from xdeepserve.eplb import ExpertLoadStats
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.launch.compose import load_model_at
from xdeepserve.launch.deployment import SupervisionConfig
from xdeepserve.launch.offline import run_batch
from xdeepserve.launch.worker.module_body import BEAT_INTERVAL_S
from xdeepserve.transformerless.expert_share import ExpertShare
from xdeepserve.transformerless.module_server import ModuleServer
from xdeepserve.transformerless.partition import partition
from xdeepserve.transformerless.routing import LiveRouting, RoutingTable
from xdeepserve.transformerless.stage_times import StageTimes
from xdeepserve.transformerless.xccl_transport import XcclTransport
from xdeepserve.xccl import Layout, Port

EXPERT_RANK, FIRST_ATTENTION_RANK, MAX_RANKS = 0, 1, 4


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
        frozen_after_s = SupervisionConfig().bypass_after_s
        run_id, name = self._order["run_id"], f"r{rank}"
        return Port(run_id, name, rank, layout=layout, frozen_after_s=frozen_after_s)

    def serve_experts(self) -> None:
        """Be the expert worker until the process is killed; tells its stage times when asked."""
        units = partition(self._model)
        server = ModuleServer(self.port(EXPERT_RANK), units, stage_times=self._times)
        threading.Thread(target=server.run, daemon=True).start()
        threading.Thread(target=self._beat, args=(server,), daemon=True).start()
        say({"ready": True})
        for _ in sys.stdin:
            say({"stages": self._times.seconds()})

    def _beat(self, server: ModuleServer) -> None:
        while True:
            server.beat()
            time.sleep(BEAT_INTERVAL_S)

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
            load_stats=self._load_stats(),
            share=ExpertShare() if self._order["share_experts"] else None,
        )
        return build_dp_group(
            model=self._model,
            model_name=name,
            config=EngineConfig(num_microbatches=self._order["num_microbatches"]),
            transport=transport,
            stage_times=self._times,
        )

    def _load_stats(self) -> ExpertLoadStats:
        spec = self._model.spec
        assert spec.moe is not None, "the benchmark serves MoE models"
        num_experts = spec.moe.gate.num_experts
        return ExpertLoadStats(num_layers=spec.num_layers, num_experts=num_experts, num_windows=1)

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


class WorkerProcess:
    """A worker as the controlling process sees it."""

    def __init__(self, order: dict[str, Any]) -> None:
        command = [sys.executable, __file__, json.dumps(order)]
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


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
