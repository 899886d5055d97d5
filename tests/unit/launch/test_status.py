"""`status` and `scale`: the table, and what their arguments may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.multiproc.cluster_harness import make_service
from xdeepserve import envs
from xdeepserve.errors import ConfigError
from xdeepserve.launch.cli import main
from xdeepserve.launch.placement import Placement
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.scale import parse_counts
from xdeepserve.launch.status import render, render_experts
from xdeepserve.launch.supervisor.messages import (
    ExpertHeat,
    HotExpert,
    LayerHeat,
    Member,
    Membership,
    Status,
    WorkerState,
)
from xdeepserve.messages import Heartbeat


@pytest.fixture(autouse=True)
def no_runs(tmp_path: Path) -> Iterator[None]:
    with envs.RUN_DIR.override(str(tmp_path)):
        yield


def test_table() -> None:
    ready = Member(
        spec=WorkerSpec(name="dp0", role="attention", rank=0),
        state=WorkerState.READY,
        incarnation=1,
        num_restarts=0,
        socket="dp0.sock",
        process=ProcessIdentity(42, 7),
        started_at_s=1000.0,
    )
    failed = Member(
        spec=WorkerSpec(name="expert0", role="expert", rank=0, experts=(0, 8)),
        state=WorkerState.FAILED,
        incarnation=9,
        num_restarts=8,
        socket="expert0.sock",
        reason="killed by SIGSEGV",
    )
    counts = {"attention": 1, "ffn": 0, "expert": 1}
    status = Status(
        membership=Membership(epoch=12, run_id="ab" * 4, counts=counts, members=(ready, failed)),
        supervisor=ProcessIdentity(41, 7),
        heartbeats={
            "dp0": Heartbeat(
                progress=3,
                load={"running": 2, "kv_usage": 0.25},
                stage_s={"head": 1.0, "attention": 2.0, "combine": 0.5, "wait": 6.5},
            )
        },
    )
    head, *rows = render(status, make_service(1, 1), now_s=4723.0)
    assert "run abababab" in head
    assert "attention=1 ffn=0 expert=1  epoch 12  supervisor 41" in head
    assert head.endswith("SLO ttft none, tpot 50 ms")
    assert [" ".join(row.split()) for row in rows[1:]] == [
        "dp0 attention ready 42 1 0 1h02m - running=2 kv_usage=0.25 "
        "wait 65% attention 20% head 10% -",
        "expert0 expert failed - 9 8 - - - - killed by SIGSEGV",
    ]


@pytest.mark.parametrize(
    ("table", "of_0", "of_2"),
    [
        ([[0, 1, 2, 3], [0, 1, 2, 3]], "2/layer", "2/layer"),
        ([[0, -1, -1, 1, 2, 3], [0, 1, 2, 3, -1, -1]], "1-3/layer", "1-3/layer"),
        ([[0, 1, 2, 3, 0, -1]] * 2, "3/layer", "2/layer"),
        ([[-1, -1, 0, 1]], "0/layer", "2/layer"),
    ],
)
def test_experts_are_those_of_the_placement_in_force(
    table: list[list[int]], of_0: str, of_2: str
) -> None:
    members = tuple(
        Member(
            spec=WorkerSpec(name=f"expert{rank}", role="expert", rank=rank, experts=(0, 8)),
            state=WorkerState.READY,
            incarnation=1,
            num_restarts=0,
            socket="",
        )
        for rank in (0, 1, 2)
    )
    placement = Placement(epoch=3, ffn=(), expert=(0, 2), table=table)
    status = Status(
        membership=Membership(
            epoch=1, run_id="ab" * 4, counts={}, members=members, placement=placement
        ),
        supervisor=ProcessIdentity(41, 7),
        heartbeats={},
    )
    _, columns, *rows = render(status, make_service(1, 1), now_s=0.0)
    at = columns.split().index("EXPERTS")
    assert [row.split()[at] for row in rows] == [of_0, "-", of_2]


def heat(**changes: object) -> ExpertHeat:
    calm = ExpertHeat(
        num_tokens=0,
        peak_over_mean=1.0,
        hottest=None,
        hottest_share=0.0,
        num_migrations=0,
        num_moves=0,
        is_migrating=False,
        placement_epoch=0,
    )
    return msgspec.structs.replace(calm, **changes)


@pytest.mark.parametrize(
    ("of_experts", "line"),
    [
        (heat(), "experts: placement 0  0 moves in 0 migrations"),
        (
            heat(
                peak_over_mean=1.256,
                hottest=(7, 3),
                hottest_share=0.31,
                num_migrations=2,
                num_moves=40,
                is_migrating=True,
                placement_epoch=9,
            ),
            "experts: placement 9  peak/mean 1.26  hottest: expert 3 of layer 7 with 31%  "
            "40 moves in 2 migrations  migrating now",
        ),
    ],
)
def test_expert_heat(of_experts: ExpertHeat, line: str) -> None:
    status = Status(
        membership=Membership(epoch=1, run_id="ab" * 4, counts={}, members=()),
        supervisor=ProcessIdentity(41, 7),
        heartbeats={},
        expert_heat=of_experts,
    )
    assert render(status, make_service(1, 1), now_s=0.0)[1] == line


def test_a_table_of_experts() -> None:
    hot = HotExpert(expert=7, share=0.5, ranks=(0, 2))
    mild = HotExpert(expert=1, share=0.25, ranks=(2,))
    layers = (
        LayerHeat(layer_idx=1, num_tokens=40, rank_ratios={0: 1.5, 2: 0.5}, hottest=(hot, mild)),
        LayerHeat(layer_idx=2, num_tokens=60, rank_ratios={0: 0.9, 2: 1.1}, hottest=(mild,)),
    )
    whole = heat(num_tokens=100, peak_over_mean=1.2, rank_ratios={0: 1.14, 2: 0.86}, layers=layers)
    head, *rows = [" ".join(row.split()) for row in render_experts(whole)]
    assert head.startswith("experts: placement 0")
    assert rows == [
        "LAYER TOKENS PEAK/MEAN EXPERT0 EXPERT2 HOTTEST EXPERTS (SHARE, WORKERS)",
        "all 100 1.20 1.14 0.86",
        "1 40 1.50 1.50 0.50 7 (50% on 0,2) 1 (25% on 2)",
        "2 60 1.10 0.90 1.10 1 (25% on 2)",
    ]


def test_no_table_without_experts_or_tokens() -> None:
    assert "no expert workers" in render_experts(None)[0]
    assert render_experts(heat())[1:] == ["no tokens of late"]


def test_counts() -> None:
    assert parse_counts(["attention=2", "expert=3"]) == {"attention": 2, "expert": 3}


@pytest.mark.parametrize("word", ["expert", "expert=", "expert=x", "expert=-1", "expert=²", "=="])
def test_counts_that_are_none(word: str) -> None:
    with pytest.raises(ConfigError, match="is not ROLE=N"):
        parse_counts([word])


def test_a_role_twice() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        parse_counts(["ffn=1", "ffn=2"])


@pytest.mark.parametrize("command", ["status", "scale expert=2", "rebalance", "status --run-id x"])
def test_without_a_service(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert "running: none" in capsys.readouterr().err
