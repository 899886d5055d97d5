"""`status` and `scale`: the table, and what their arguments may be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multiproc.cluster_harness import make_service
from xdeepserve import envs
from xdeepserve.errors import ConfigError
from xdeepserve.launch.cli import main
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.process_identity import ProcessIdentity
from xdeepserve.launch.scale import parse_counts
from xdeepserve.launch.status import render
from xdeepserve.launch.supervisor.messages import Member, Membership, Status, WorkerState
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
    assert [" ".join(row.split()) for row in rows[1:]] == [
        "dp0 attention ready 42 1 0 1h02m - running=2 kv_usage=0.25 "
        "wait 65% attention 20% head 10% -",
        "expert0 expert failed - 9 8 - 0-7 - - killed by SIGSEGV",
    ]


def test_counts() -> None:
    assert parse_counts(["attention=2", "expert=3"]) == {"attention": 2, "expert": 3}


@pytest.mark.parametrize("word", ["expert", "expert=", "expert=x", "expert=-1", "expert=²", "=="])
def test_counts_that_are_none(word: str) -> None:
    with pytest.raises(ConfigError, match="is not ROLE=N"):
        parse_counts([word])


def test_a_role_twice() -> None:
    with pytest.raises(ConfigError, match="named twice"):
        parse_counts(["ffn=1", "ffn=2"])


@pytest.mark.parametrize("command", ["status", "scale expert=2", "status --run-id x"])
def test_without_a_service(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert "running: none" in capsys.readouterr().err
