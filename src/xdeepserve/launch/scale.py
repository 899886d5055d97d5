"""`xdeepserve scale`: change the number of workers of a running service and wait until it is so."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from xdeepserve.errors import ConfigError, ConnectionLost, DeadlineExceeded, EngineDeadError
from xdeepserve.launch.flags import positive_seconds
from xdeepserve.launch.run_dir import RunDirectory, choose_run
from xdeepserve.launch.supervisor.client import connect_supervisor, scale_run
from xdeepserve.launch.supervisor.messages import Membership, Subscribe

RECONNECT_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "counts",
        nargs="+",
        metavar="ROLE=N",
        help="for example attention=2 expert=3; roles that are not named stay as they are",
    )
    parser.add_argument("--run-id", metavar="ID", help="which service, where several run here")
    parser.add_argument(
        "--timeout",
        type=positive_seconds,
        default=300.0,
        help="seconds to wait (default: %(default)s)",
    )
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Scale; 0 when the new number of workers serves."""
    counts = parse_counts(args.counts)
    membership = asyncio.run(_scale(choose_run(args.run_id), counts, args.timeout))
    print(" ".join(f"{role}={count}" for role, count in membership.counts.items()))
    return 0


def parse_counts(words: Sequence[str]) -> dict[str, int]:
    """`["expert=3"]` -> `{"expert": 3}`.

    Raises:
        ConfigError: a word is not ROLE=N, or a role is named twice.
    """
    counts: dict[str, int] = {}
    for word in words:
        role, equals, number = word.partition("=")
        if not equals or not number.isascii() or not number.isdecimal() or len(number) > 6:
            raise ConfigError(f"{word!r} is not ROLE=N, for example expert=3")
        if role in counts:
            raise ConfigError(f"role {role!r} is named twice")
        counts[role] = int(number)
    return counts


async def _scale(run: RunDirectory, counts: dict[str, int], timeout_s: float) -> Membership:
    begun = await scale_run(run, counts)
    try:
        async with asyncio.timeout(timeout_s):
            return await _wait_settled(run, begun.epoch)
    except TimeoutError:
        raise DeadlineExceeded(
            f"scaling to {counts} takes longer than {timeout_s:g} s; see `xds status`"
        ) from None


async def _wait_settled(run: RunDirectory, epoch: int) -> Membership:
    """The first membership from `epoch` on whose workers all serve; survives the supervisor."""
    while True:
        try:
            async with (
                connect_supervisor(run) as client,
                aclosing(client.stream(Subscribe(), item_timeout_s=None)) as memberships,
            ):
                membership: Membership
                async for membership in memberships:
                    if membership.epoch >= epoch and membership.is_settled():
                        return membership
        except (ConnectionLost, DeadlineExceeded):
            if run.gateway() is None:
                raise EngineDeadError(f"the service {run.run_id} has ended") from None
        await asyncio.sleep(RECONNECT_S)
