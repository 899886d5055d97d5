"""RoutingFeed: keeps a DP group's routing in step with what the supervisor publishes.

It reads the run's state file, which always holds the latest membership. So it needs no connection,
and the group goes on with what it knows while there is no supervisor.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from xdeepserve.errors import ConfigError
from xdeepserve.launch.fabric import Fabric
from xdeepserve.launch.placement import Placement, routing_table
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.launch.service import ServiceConfig
from xdeepserve.launch.supervisor.messages import SavedState
from xdeepserve.transformerless.routing import LiveRouting

FEED_INTERVAL_S: Final = 0.02
"""Between two looks at the file's stamp."""

_Stamp = tuple[int, int, int]
"""Inode, time of change and size: of two files written within a tick of the clock, one differs."""

logger = logging.getLogger(__name__)


def published_placement(run: RunDirectory) -> Placement | None:
    """The placement in force, as the state file says.

    Raises:
        OSError, msgspec.DecodeError: it cannot be read, or is damaged.
    """
    return msgspec.json.decode(run.state_path.read_bytes(), type=SavedState).membership.placement


class RoutingFeed:
    """Owns the LiveRouting of one DP group. Thread: the event loop; readers anywhere."""

    def __init__(self, run: RunDirectory, service: ServiceConfig, fabric: Fabric) -> None:
        """Begin with the placement that the run has now.

        Raises:
            ConfigError: the state file is missing or damaged.
        """
        self._run = run
        self._service = service
        self.fabric = fabric
        self._stamp: _Stamp | None = None
        placement = self._read()
        if placement is None:
            raise ConfigError(f"{run.state_path} holds no placement; is a supervisor running?")
        self.routing = LiveRouting(routing_table(placement, service.shape, fabric))

    async def follow(self) -> None:
        """Swap in every new placement, until cancelled."""
        while True:
            await asyncio.sleep(FEED_INTERVAL_S)
            placement = self._read()
            if placement is None or placement.epoch <= self.routing.current.epoch:
                continue
            self.routing.swap(routing_table(placement, self._service.shape, self.fabric))
            # Nobody is in use when everything ends, which needs no telling.
            logger.log(
                logging.INFO if placement.ffn or placement.expert else logging.DEBUG,
                "routing epoch %d: FFN workers %s, expert workers %s",
                placement.epoch,
                placement.ffn or "none",
                placement.expert or "none",
            )

    def _read(self) -> Placement | None:
        """The placement in the state file; None when the file is as before, or unreadable."""
        path, before = self._run.state_path, self._stamp
        try:
            info = path.stat()
            # Noted before it is read, so that a damaged file is complained about once.
            self._stamp = info.st_ino, info.st_mtime_ns, info.st_size
            if self._stamp == before:
                return None
            return published_placement(self._run)
        except msgspec.DecodeError as exc:
            logger.warning("%s is damaged: %s", path, exc)
        except OSError as exc:
            self._stamp = None
            if before is not None:
                logger.warning("%s cannot be read: %s", path, exc)
        return None
