"""A gateway with a ledger that kills itself at a point; run by test_ledger_crash.py.

Arguments: database URL, folder, point, how often it is passed before. Prints its port. The engine
keeps a record of its own of what it has made, in a file that outlives it, too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.config import GatewayConfig
from xdeepserve.maas.access import Access
from xdeepserve.maas.accounts.authenticator import Authenticator
from xdeepserve.maas.app import create_app
from xdeepserve.maas.ledger import writer as writer_module
from xdeepserve.maas.ledger.billing import Billing
from xdeepserve.maas.ledger.meter import Meter, MeterFile
from xdeepserve.maas.ledger.prices import Price, PriceTable, TokenCounts
from xdeepserve.maas.ledger.writer import LedgerWriter
from xdeepserve.maas.server import run_server
from xdeepserve.maas.storage.database import Database
from xdeepserve.messages import GenerateRequest, TokenOutput

MODEL = "toy"
PRICES = PriceTable(version="v1", models={"*": {"default": Price(3_000_000, 5_000_000, 1_000_000)}})
TEXT = "The quick brown fox jumps over the lazy dog"

POINTS: dict[str, tuple[Any, str]] = {
    "claim": (MeterFile, "claim"),
    "reserve": (writer_module, "reserve"),
    "reservations committed": (LedgerWriter, "_reserve"),
    "record": (Meter, "record"),
    "finish": (Meter, "finish"),
    "settle": (writer_module, "settle"),
    "charges committed": (LedgerWriter, "_settle"),
    "free": (MeterFile, "free"),
}
"""Name -> what is passed; each is a point before and one after."""


class WitnessedEngine(ReplayEngine):
    """Writes down what it makes before anybody else sees it."""

    def __init__(self, witness: MeterFile) -> None:
        super().__init__(steps_of(TEXT, step=1))
        self._witness = witness

    async def _replay(
        self, request: GenerateRequest, script: Sequence[TokenOutput]
    ) -> AsyncGenerator[TokenOutput, None]:
        meter = self._witness.claim(request.request_id.rpartition("-")[0])
        async for output in super()._replay(request, script):
            await asyncio.sleep(0.002)
            usage = output.usage
            meter.record(TokenCounts(usage.num_prompt_tokens, 0, usage.num_output_tokens))
            yield output


def kill_at(place: tuple[Any, str], *, is_after: bool, countdown: int) -> None:
    """SIGKILL this process when it has passed the place so often."""
    owner, name = place
    true: Callable[..., Any] = getattr(owner, name)
    passed = 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed == countdown and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = true(*arguments, **options)
        if passed == countdown:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, watched)


def main() -> None:
    url, folder, point, countdown = sys.argv[1:5]
    when, _, place = point.partition(" ")
    meters = MeterFile(Path(folder) / "meters" / f"{os.getpid()}.meter")
    engine = WitnessedEngine(MeterFile(Path(folder) / "witness" / f"{os.getpid()}.meter"))
    if place:
        kill_at(POINTS[place], is_after=when == "after", countdown=int(countdown))
    database = Database(url)
    writer = LedgerWriter(database, meters, Path(folder) / "meters")
    config = GatewayConfig(port=0)
    app = create_app(
        engine,
        byte_tokenizer(chat_template=None),
        config,
        model_names=[MODEL],
        access=Access(Authenticator(database), Billing(writer, meters, PRICES, database)),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        run_server(app, config, listener=listener, on_ready=lambda _: print(port, flush=True))
    writer.close(20)
    meters.close()


if __name__ == "__main__":
    main()
