"""Law 1 taken apart: attention, FFN and expert processes give what one engine gives, bit for bit.

The default run takes one topology per model and precision; the whole matrix of models, precisions,
topologies and microbatches, five loads each, is `pytest tests/multiproc/test_exactness.py -m soak`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.multiproc.exactness import (
    Topology,
    colocated,
    install_toy,
    make_service,
    mixed_load,
    serving,
)
from xdeepserve import envs
from xdeepserve.config import ModelConfig
from xdeepserve.errors import ConfigError
from xdeepserve.launch.compose import load_named
from xdeepserve.testing.toy_models import toy_checkpoint

pytestmark = pytest.mark.slow

SEEDS = range(5)
SAMPLED_DTYPES = ("bf16", "int8")
DTYPES = (*SAMPLED_DTYPES, "int4")

ROUTED = (
    Topology(attention=1, expert=1),
    Topology(attention=2, expert=2),
    Topology(attention=1, expert=3, replicas=1),
)
WITH_FFN = (*ROUTED, Topology(attention=2, ffn=1, expert=2))
DENSE = (
    Topology(attention=1, ffn=1),
    Topology(attention=2, ffn=1),
    Topology(attention=2, ffn=2),
)

TOYS: dict[str, tuple[Topology, ...]] = {
    "mixtral": ROUTED,
    "qwen3_moe": WITH_FFN,
    "glm4_moe": WITH_FFN,
    "deepseek_v3": WITH_FFN,
    "llama3": DENSE,
    "qwen2": DENSE,
}
MTP_TOY = "deepseek_v3_mtp"
REAL: dict[str, tuple[Topology, ...]] = {"smollm2-135m-moe8": WITH_FFN, "smollm2-135m": DENSE}


class Cell(NamedTuple):
    """One running service of the matrix."""

    model: str
    dtype: str
    topology: Topology

    @property
    def max_tokens(self) -> int:
        """Output per request; the real models are slower."""
        return 8 if self.model in REAL else 24

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}-{self.topology}"


def every_cell() -> list[Cell]:
    """The matrix; experts are shared in every other cell that has any."""
    return [
        Cell(model, dtype, varied(topology, count, number + idx))
        for model, topologies in (TOYS | REAL).items()
        for idx, dtype in enumerate(DTYPES)
        for number, topology in enumerate(topologies)
        for count in (1, 2)
    ]


def varied(topology: Topology, num_microbatches: int, number: int) -> Topology:
    """With so many microbatches, and shared experts where the sum of both numbers is even."""
    is_shared = topology.expert > 0 and (number + num_microbatches) % 2 == 0
    return replace(topology, num_microbatches=num_microbatches, share_experts=is_shared)


def sample() -> list[Cell]:
    """Every MoE family in two precisions; every topology and number of microbatches somewhere.

    One cell is in float32, where not even a last bit is lost to rounding on the way to a logprob.
    """
    cells = []
    for number, model in enumerate(("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "llama3")):
        for idx, dtype in enumerate(SAMPLED_DTYPES):
            topology = TOYS[model][(number + idx) % len(TOYS[model])]
            count = 1 + (number + idx + 1) % 2
            cells.append(Cell(model, dtype, varied(topology, count, number // 2)))
    overlapped = replace(WITH_FFN[-1], num_microbatches=2, share_experts=True)
    cells.append(Cell("glm4_moe", "float32", overlapped))
    cells.append(Cell("deepseek_v3", "int4", overlapped))
    cells.append(Cell("smollm2-135m-moe8", "int8", overlapped))
    cells.append(Cell("smollm2-135m-moe8", "int4", overlapped))
    cells.append(Cell(MTP_TOY, "bf16", replace(overlapped, speculation="mtp")))
    cells.append(Cell("glm4_moe", "bf16", replace(WITH_FFN[-1], speculation="ngram")))
    return cells


def params(cells: Sequence[Cell]) -> list[object]:
    """Real weights are marked."""
    return [
        pytest.param(cell, id=str(cell), marks=[pytest.mark.weights] if cell.model in REAL else [])
        for cell in cells
    ]


@pytest.fixture(scope="module")
def toy_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    for name in (*TOYS, MTP_TOY):
        install_toy(home, name, toy_checkpoint(name))
    routed_only = toy_checkpoint("qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[])
    install_toy(home, "qwen3_moe_routed", routed_only)
    return home


def use_home(stack: ExitStack, model: str, toy_home: Path) -> None:
    """Find toys in their own home, real models in the machine's."""
    if model not in REAL:
        stack.enter_context(envs.HOME.override(str(toy_home)))


async def check(cell: Cell, seeds: Sequence[int]) -> None:
    async with serving(cell.model, cell.dtype, cell.topology) as service:
        vocab_size = service.router.info.vocab_size
        for seed in seeds:
            expected = colocated(cell.model, cell.dtype, seed, cell.max_tokens)
            requests = mixed_load(vocab_size, seed, max_tokens=cell.max_tokens)
            await service.check(requests, expected)


@pytest.mark.parametrize("cell", params(sample()))
async def test_disaggregated_equals_colocated(cell: Cell, toy_home: Path) -> None:
    with ExitStack() as stack:
        use_home(stack, cell.model, toy_home)
        await check(cell, SEEDS[:1])


@pytest.mark.soak
@pytest.mark.parametrize("cell", params(every_cell()))
async def test_whole_matrix(cell: Cell, toy_home: Path) -> None:
    with ExitStack() as stack:
        use_home(stack, cell.model, toy_home)
        await check(cell, SEEDS)


REFUSED: dict[str, tuple[str, Topology, str]] = {
    "experts of a dense toy": (
        "llama3",
        Topology(attention=1, expert=1),
        "roles.expert.count=1, but llama3 is a dense model without routed experts",
    ),
    "experts of the dense real model": (
        "smollm2-135m",
        Topology(attention=1, expert=2),
        "roles.expert.count=2, but smollm2-135m is a dense model without routed experts",
    ),
    "FFN of mixtral": (
        "mixtral",
        Topology(attention=2, ffn=1, expert=2),
        "roles.ffn.count=1, but every layer of mixtral is made of routed experts alone",
    ),
    "FFN of a qwen3_moe without dense layers": (
        "qwen3_moe_routed",
        Topology(attention=1, ffn=2, expert=1),
        "roles.ffn.count=2, but every layer of qwen3_moe_routed is made of routed experts alone",
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.weights] if REFUSED[name][0] in REAL else [])
        for name in REFUSED
    ],
)
def test_a_role_without_use_is_refused(name: str, toy_home: Path) -> None:
    model, topology, message = REFUSED[name]
    with ExitStack() as stack:
        use_home(stack, model, toy_home)
        loaded = load_named(model, ModelConfig(dtype="int8"))
        with pytest.raises(ConfigError) as caught:
            make_service(loaded, "int8", topology)
    assert message in caught.value.message
