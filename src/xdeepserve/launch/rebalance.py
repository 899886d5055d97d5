"""`xdeepserve rebalance`: move the experts of a running service to where their load wants them."""

from __future__ import annotations

import argparse
import asyncio

from xdeepserve.launch.flags import positive_seconds
from xdeepserve.launch.run_dir import RunDirectory, choose_run
from xdeepserve.launch.supervisor.client import REBALANCE_TIMEOUT_S, rebalance_run, status_of
from xdeepserve.launch.supervisor.messages import Membership


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-id", metavar="ID", help="which service, where several run here")
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=REBALANCE_TIMEOUT_S,
        help="seconds to wait (default: %(default)s)",
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Rebalance for the load of late; 0 when the experts are where they should be."""
    before, after = asyncio.run(_rebalance(choose_run(args.run_id), args.timeout))
    print(describe(before, after))
    return 0


async def _rebalance(run: RunDirectory, timeout_s: float) -> tuple[Membership, Membership]:
    before = (await status_of(run)).membership
    return before, await rebalance_run(run, timeout_s=timeout_s)


def describe(before: Membership, after: Membership) -> str:
    """What a rebalance has changed, in a line."""
    old, new = before.placement, after.placement
    assert old is not None, "a supervisor that answers has placed the experts"
    assert new is not None, "as before"
    if (new.expert, new.table) == (old.expert, old.table):
        return f"the experts stay where they are: placement {new.epoch}"
    return f"the experts have moved: placement {old.epoch} -> {new.epoch}"
