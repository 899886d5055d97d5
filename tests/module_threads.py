"""FFN and expert servers as threads of the test's process, and a transport that reaches them."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence

import numpy as np

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.models.decoder import Model
from xdeepserve.ops import I32
from xdeepserve.transformerless.exchange_limit import EXCHANGE_TIMEOUT_S, ExchangeLimit
from xdeepserve.transformerless.expert_share import ExpertShare
from xdeepserve.transformerless.module_server import ModuleServer
from xdeepserve.transformerless.partition import partition
from xdeepserve.transformerless.routing import LiveRouting, RoutingTable
from xdeepserve.transformerless.stage_times import StageTimes
from xdeepserve.transformerless.xccl_transport import XcclTransport
from xdeepserve.xccl import Layout, Port

FIRST_FFN, FIRST_EXPERT, MAX_RANKS = 4, 8, 12

_run_numbers = itertools.count()


class ModuleThreads:
    """One run: attention ranks 0 to 3, FFN ranks from 4, expert ranks from 8."""

    def __init__(
        self,
        model: Model,
        *,
        num_ffn: int = 0,
        placement: Sequence[Sequence[int]] = (),
        max_rows: int = 512,
    ) -> None:
        """Start the servers.

        Args:
            num_ffn: FFN servers.
            placement: experts of each expert server, equally many (-1 = empty), in every layer.
        """
        self.model = model
        self.units = partition(model)
        moe = model.spec.moe
        self.num_experts = 0 if moe is None else moe.gate.num_experts
        self._run_id = f"t{os.getpid()}x{next(_run_numbers)}"
        self._layout = Layout.for_rows(
            max_ranks=MAX_RANKS,
            max_rows=max_rows,
            hidden_size=model.spec.hidden_size,
            top_k=1 if moe is None else moe.gate.top_k,
        )
        self.routing = LiveRouting(self.table(num_ffn=num_ffn, placement=placement))
        self.servers: dict[int, ModuleServer] = {}
        self._ports: list[Port] = []
        self._threads: dict[int, list[threading.Thread]] = {}
        for rank in (*self.routing.current.ffn_ranks, *self.routing.current.expert_ranks):
            self.start_server(rank)

    def table(
        self, *, num_ffn: int = 0, placement: Sequence[Sequence[int]] = (), epoch: int = 0
    ) -> RoutingTable:
        """The routing table of a placement."""
        row: I32 = np.asarray(placement, np.int32).reshape(-1)
        return RoutingTable.build(
            np.tile(row, (self.model.spec.num_layers, 1)),
            num_experts=self.num_experts,
            expert_ranks=range(FIRST_EXPERT, FIRST_EXPERT + len(placement)),
            ffn_ranks=range(FIRST_FFN, FIRST_FFN + num_ffn),
            epoch=epoch,
        )

    def start_server(self, rank: int) -> None:
        """Begin to serve at a rank; a new life of it where one was before."""
        server = ModuleServer(self.port(rank), self.units, stage_times=StageTimes())
        self.servers[rank] = server
        thread = threading.Thread(target=server.run, daemon=True)
        self._threads.setdefault(rank, []).append(thread)
        thread.start()

    def port(self, rank: int, *, frozen_after_s: float = 5.0) -> Port:
        """A life of a rank; closed with the run at the latest."""
        port = Port(
            self._run_id, f"r{rank}", rank, layout=self._layout, frozen_after_s=frozen_after_s
        )
        self._ports.append(port)
        return port

    def transport(
        self,
        rank: int = 0,
        *,
        timeout_s: float = EXCHANGE_TIMEOUT_S,
        frozen_after_s: float = 5.0,
        share: ExpertShare | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> XcclTransport:
        """The transport of an attention rank, linked to all servers."""
        port, table = self.port(rank, frozen_after_s=frozen_after_s), self.routing.current
        port.wait_linked([*table.ffn_ranks, *table.expert_ranks], timeout_s=10.0)
        return XcclTransport(
            port=port,
            units=self.units,
            routing=self.routing,
            stage_times=StageTimes(),
            share=share,
            limit=ExchangeLimit(timeout_s, clock),
        )

    def close(self) -> None:
        """Stop all servers, close all ports."""
        for server in self.servers.values():
            server.stop()
        for rank in self._threads:
            for thread in self.threads_of(rank):
                thread.join(timeout=10.0)
                assert not thread.is_alive(), "a module server does not stop"
        for port in self._ports:
            port.close()

    def threads_of(self, rank: int) -> list[threading.Thread]:
        """Of all lives of a rank."""
        return self._threads[rank]
