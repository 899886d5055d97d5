"""`xds xccl trace`, and the switch that gives a service's transfers their times."""

from __future__ import annotations

import json

import pytest

from tests.unit.xccl.ports import SOON_S, TAG, native_ranks, rows_of
from xdeepserve import envs
from xdeepserve.launch.cli import main
from xdeepserve.launch.deployment import Deployment, RoleSpec, RolesSpec
from xdeepserve.launch.fabric import Fabric
from xdeepserve.launch.plan import ModelShape
from xdeepserve.xccl import read_transfers

ROWS = rows_of(3, 4)


def test_the_command(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = native_ranks(run_id)
    one, two, three = made.join(0, 1, 2)
    for port in made.ports.values():
        port.open_trace(8)
    with one.exchange(ROWS) as exchange:
        exchange.add(1, tag=TAG)
        exchange.add(2, tag=TAG)
        exchange.post(SOON_S)
        for batch in (*two.poll(), *three.poll()):
            batch.reply(batch.rows)
        exchange.wait(SOON_S)
        one.send(2, b"x", timeout_s=SOON_S)
        command = ["xccl", "trace", "--run-id", run_id]
        assert main([*command, "--json"]) == 0
        chunk, *requests = map(json.loads, capsys.readouterr().out.splitlines())
        assert (chunk["kind"], chunk["start_s"], chunk["duration_us"]) == ("chunk", None, None)
        assert [(r["peer"], r["state"], r["epoch"]) for r in requests] == [
            (1, "answered", 1),
            (2, "answered", 1),
        ]
        assert all(r["duration_us"] > 0 and r["start_s"] > 1e9 for r in requests)
        assert main([*command, "--rank", "1", "--last", "1"]) == 0
        run, head, line = capsys.readouterr().out.splitlines()
        assert run == f"run {run_id}  ranks: 0=r0 1=r1 2=r2"
        assert head.split()[:4] == ["RANK", "PEER", "KIND", "STATE"]
        assert line.split()[:4] == ["0", "1", "request", "answered"]
        assert line.endswith("us")
    made.close()


def test_the_command_refuses_what_it_cannot_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xccl", "trace", "--run-id", "nosuch"]) == 1
    assert main(["xccl", "trace", "--run-id", "nosuch", "--last", "0"]) == 2
    assert "--last 0 must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("switch", ["on", "off"])
def test_a_switch_gives_a_worker_times(run_id: str, switch: str) -> None:
    deployment = Deployment(roles=RolesSpec(ffn=RoleSpec(count=1)))
    shape = ModelShape(name="m", num_experts=0, has_ffn=True, num_layers=1, hidden_size=4, top_k=0)
    with envs.XCCL_TRACE.override(switch):
        port = Fabric.of(run_id, deployment, shape).open_port("dp0", "attention", 0)
    port.attach(port.blob())
    with port, port.exchange(ROWS) as exchange:
        exchange.add(0, tag=TAG)
        exchange.post(SOON_S)
        (transfer,) = read_transfers(run_id)
        assert (transfer.start_ns is None) == (switch == "off")
