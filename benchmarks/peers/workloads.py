"""The workloads of the comparison, their prompts, and what is read off a run.

Every engine gets the same prompts in the same turn. All answers are greedy and of fixed length.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

TOKEN_RANGE: Final = range(256, 8192)
"""Above special and byte tokens, inside every vocabulary."""

WARM_UP_SEED: Final = "warm-up"
WARM_UP_LEN: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """One batch, all there at the start.

    Attributes:
        name: as on the command line.
        batch: requests.
        input_len: prompt tokens of each, the shared ones included.
        output_len: tokens that each generates.
        shared_len: first tokens that all prompts have in common.
        metrics: what is read off a run, see `read_metrics`.
        aim: what the workload shows.
    """

    name: str
    batch: int
    input_len: int
    output_len: int
    shared_len: int = 0
    metrics: tuple[str, ...] = ("output tok/s",)
    aim: str = ""

    def prompts(self, seed: str) -> list[list[int]]:
        """Random token ids, a pure function of the workload and the seed."""
        rng = random.Random(f"{self.name} {seed}")
        shared = rng.choices(TOKEN_RANGE, k=self.shared_len)
        own_len = self.input_len - self.shared_len
        return [shared + rng.choices(TOKEN_RANGE, k=own_len) for _ in range(self.batch)]

    def order(self, seed: str) -> dict[str, Any]:
        """What a worker is told; to warm up, a few tokens of the same prompts are enough."""
        is_warm_up = seed == WARM_UP_SEED
        return {
            "prompts": self.prompts(seed),
            "output_len": WARM_UP_LEN if is_warm_up else self.output_len,
            "shared_len": self.shared_len,
        }

    def read_metrics(self, answer: Mapping[str, float]) -> dict[str, float]:
        """Metric -> value, all better when higher, from a worker's answer.

        Args:
            answer: seconds of the whole batch, mean seconds to the first token (ttft_s) and mean
                seconds between tokens (tpot_s).
        """
        values = {
            "output tok/s": self.batch * self.output_len / answer["seconds"],
            "prefill tok/s": self.batch * self.input_len / answer["ttft_s"],
            "decode tok/s": 1.0 / answer["tpot_s"],
        }
        return {name: values[name] for name in self.metrics}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineWorkload:
    """Streaming clients in a closed loop against a server.

    Attributes:
        tpot_slo_ms: 0 = `clients` as they are; else as many as keep the mean TPOT within it.
    """

    name: str
    clients: int
    input_len: int = 128
    output_len: int = 128
    waves: int = 3
    tpot_slo_ms: float = 0.0
    metrics: tuple[str, ...] = ("output tok/s",)
    aim: str = ""


_SINGLE: Final = ("prefill tok/s", "decode tok/s")

OFFLINE: Final = (
    Workload(name="offline32", batch=32, input_len=128, output_len=128, aim="throughput"),
    Workload(name="offline64", batch=64, input_len=128, output_len=128, aim="throughput"),
    Workload(name="single", batch=1, input_len=512, output_len=64, metrics=_SINGLE, aim="latency"),
    Workload(name="long", batch=4, input_len=4096, output_len=64, aim="long context"),
    Workload(
        name="prefix", batch=16, input_len=1056, output_len=64, shared_len=1024, aim="prefix cache"
    ),
)

ONLINE: Final = (
    OnlineWorkload(name="online16", clients=16, aim="streaming clients"),
    OnlineWorkload(name="tps50", clients=16, waves=2, tpot_slo_ms=50.0, aim="TPS at 50 ms TPOT"),
)

WORKLOADS: Final[dict[str, Workload | OnlineWorkload]] = {w.name: w for w in (*OFFLINE, *ONLINE)}

MAX_SEQS: Final = max(workload.batch for workload in OFFLINE)
MAX_MODEL_LEN: Final = max(workload.input_len + workload.output_len for workload in OFFLINE)
