"""What the processes of the tests do: `python -m ... RUN_ID WORK`, arguments as JSON on stdin."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.multiproc.xccl.processes import LAYOUT
from xdeepserve import _xccl
from xdeepserve.errors import PeerLost
from xdeepserve.xccl import Batch, EpGroup, Port, Tag, Trampoline
from xdeepserve.xccl.port import FORWARD

STOP = 99  # kind of a request that ends a server
SIZES = (8, 5000, 40, 30000, 0, 4096)  # of the messages of a stream: one line, one slot, several
WAIT_S = 20.0
EP_WIDTH = 16


def message(index: int) -> np.ndarray:
    """The index-th message of a stream."""
    size = SIZES[index % len(SIZES)]
    return ((np.arange(size) * 7 + index * 13) % 251).astype(np.uint8)


def port_of(run_id: str, arguments: dict[str, Any]) -> Port:
    """This process's port, linked with `peers`, its fault armed."""
    rank = int(arguments["rank"])
    if arguments.get("arm_early"):
        _xccl.arm_fault(arguments["fault"], arguments.get("countdown", 1))
    frozen_after_s = arguments.get("frozen_after_s", 5.0)
    port = Port(run_id, f"r{rank}", rank, layout=LAYOUT, frozen_after_s=frozen_after_s)
    if arguments.get("trace"):
        port.open_trace(64)
    port.wait_linked(arguments.get("peers", [0]), WAIT_S)
    if "fault" in arguments:
        _xccl.arm_fault(arguments["fault"], arguments.get("countdown", 1))
    return port


def server(port: Port, arguments: dict[str, Any]) -> Any:
    """Doubles rows and says whom it served, until told to stop."""
    served = 0
    while True:
        port.discover()
        for batch in port.poll(0.2):
            batch.reply(np.ascontiguousarray(batch.rows) * np.float32(2))
            if batch.kind == STOP:
                return {"served": served, "cancelled": port.num_cancelled}
            served += 1


def expert(port: Port, arguments: dict[str, Any]) -> Any:
    """Row times (expert + 1) for each pair; forwards what comes for a trampoline."""
    trampoline = Trampoline(port, hidden_size=arguments["hidden_size"])
    owners = np.array(arguments["owners"], np.int32)
    while True:
        port.discover_news()
        port.wait_any(trampoline.exchanges, 0.2, True)
        trampoline.progress()
        for batch in port.poll():
            if batch.kind == STOP:
                batch.reply(np.zeros((1, 1), np.float32))
                return None
            if batch.kind == FORWARD:
                trampoline.forward(batch, owners)
                continue
            out = [batch.rows[row] * np.float32(expert + 1) for row, expert in batch.pairs]
            batch.reply(np.array(out, np.float32))


def asker(port: Port, arguments: dict[str, Any]) -> Any:
    """Asks rank 0 `count` times, `depth` at a time; checks every answer."""
    under_way: list[tuple[Any, np.ndarray]] = []
    checked = 0
    rank = int(arguments["rank"])
    for step_idx in range(int(arguments["count"])):
        rows = np.full((3, 5), step_idx * 10 + rank, np.float32)
        exchange = port.exchange(rows)
        exchange.add(arguments.get("to", 0), tag=Tag(1, step_idx, 0, 0))
        exchange.post(WAIT_S)
        under_way.append((exchange, rows))
        if len(under_way) >= arguments.get("depth", 1):
            checked += settle(*under_way.pop(0))
    for item in under_way:
        checked += settle(*item)
    return {"checked": checked}


def settle(exchange: Any, rows: np.ndarray) -> int:
    exchange.wait(WAIT_S)
    (reply,) = exchange.replies()
    assert np.array_equal(reply.rows, rows * np.float32(2))
    exchange.release()
    return 1


def sender(port: Port, arguments: dict[str, Any]) -> Any:
    """Sends a stream to rank 0."""
    for index in range(int(arguments["count"])):
        port.send(0, message(index), tag=index, timeout_s=WAIT_S)
    port.flush(0, WAIT_S)
    return {"sent": arguments["count"]}


def receiver(port: Port, arguments: dict[str, Any]) -> Any:
    """Takes a stream from rank 0 and checks it."""
    out = np.zeros(max(SIZES), np.uint8)
    for index in range(int(arguments["count"])):
        size, tag = port.recv(0, out, timeout_s=WAIT_S)
        assert (size, tag) == (SIZES[index % len(SIZES)], index)
        assert np.array_equal(out[:size], message(index))
    return {"received": arguments["count"]}


def putter(port: Port, arguments: dict[str, Any]) -> Any:
    """Writes numbered records into rank 0's window, each followed by a signal."""
    for index in range(1, int(arguments["count"]) + 1):
        port.put(0, 64, np.full(256, index % 256, np.uint8))
        port.signal(0, 0, index)
        port.wait_signal(0, index, WAIT_S, [0])
    return {"put": arguments["count"]}


def ep_rank(port: Port, arguments: dict[str, Any]) -> Any:
    """One rank of a colocated EP group: dispatch, recv, compute, combine, checked."""
    ranks = arguments["ranks"]
    member = EpMember(port, ranks)
    first, end = arguments.get("first_step", 0), int(arguments["steps"])
    for step_idx in range(first, end):
        member.begin(Tag(arguments.get("epoch", 1), step_idx, 0, 0))
        member.serve()
        member.finish()
    leave(port, ranks)
    # Nobody's loss ends this wait: who has all signals closes its port before others have theirs.
    port.wait_signal(0, len(ranks), WAIT_S)
    return {"steps": end - first}


def leave(port: Port, ranks: Sequence[int]) -> None:
    """Says that all is done: who closes its port before the others have all they need is lost."""
    port.check_integrity()
    for rank in ranks:
        port.add(rank, 0, 1)


class EpMember:
    """One rank's step of an EP group, verb by verb; its rows follow from the rank and the step."""

    def __init__(self, port: Port, ranks: Sequence[int]) -> None:
        self.port = port
        self.owners = np.repeat(np.array(ranks, np.int32), 2)
        self.group = EpGroup(port, ranks)
        self.batches: list[Batch] = []

    def begin(self, tag: Tag) -> None:
        rng = np.random.default_rng([self.port.rank, tag.step_idx])
        num_tokens = int(rng.integers(1, 9))
        self.tag = tag
        self.hidden = rng.standard_normal((num_tokens, EP_WIDTH), dtype=np.float32)
        self.ids = rng.integers(-1, len(self.owners), (num_tokens, 2)).astype(np.int32)
        self.weights = rng.random((num_tokens, 2), dtype=np.float32)
        self.exchange = self.group.dispatch(
            tag=tag, hidden_states=self.hidden, topk_ids=self.ids, expert_rank=self.owners
        )

    def serve(self) -> None:
        self.batches = self.group.recv(self.tag, WAIT_S)
        while self.batches:
            batch = self.batches.pop()
            out = [batch.rows[row] * np.float32(e + 1) for row, e in batch.pairs]
            batch.reply(np.array(out, np.float32).reshape(-1, EP_WIDTH))

    def finish(self) -> None:
        got = self.group.combine(
            self.exchange, self.weights, hidden_size=EP_WIDTH, timeout_s=WAIT_S
        )
        assert np.array_equal(got, layer_by_hand(self.hidden, self.ids, self.weights))


def layer_by_hand(hidden: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[T, H]: what experts that multiply by (expert + 1) and the weighted sum give together."""
    out = np.zeros(hidden.shape, np.float32)
    for t, k in np.ndindex(*ids.shape):
        if ids[t, k] >= 0:
            out[t] += weights[t, k] * (hidden[t] * np.float32(ids[t, k] + 1))
    return out


def idle(port: Port, arguments: dict[str, Any]) -> Any:
    """Lives for ever and serves nobody; ends when rank 0 is lost."""
    while True:
        try:
            port.wait_signal(8, 1, WAIT_S, [0])
        except PeerLost:
            return None


WORKS = {
    work.__name__: work for work in (server, expert, asker, sender, receiver, putter, ep_rank, idle)
}


def main() -> None:
    run_id, work = sys.argv[1:]
    arguments = json.load(sys.stdin)
    with port_of(run_id, arguments) as port:
        print(json.dumps(WORKS[work](port, arguments)))


if __name__ == "__main__":
    main()
