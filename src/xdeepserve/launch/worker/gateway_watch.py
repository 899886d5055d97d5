"""GatewayWatch: ends this process when the gateway of its run is gone, whatever else hangs."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

from xdeepserve.errors import ConfigError
from xdeepserve.launch.run_dir import RunDirectory
from xdeepserve.launch.worker.exit_codes import EXIT_ORPHANED

logger = logging.getLogger(__name__)


class GatewayWatch:
    """A daemon thread that sleeps on the gateway's pidfd."""

    def __init__(self, run: RunDirectory, *, on_gone: Callable[[], None], grace_s: float) -> None:
        """Begin to watch.

        Args:
            run: whose gateway.
            on_gone: called on the watching thread; asks the process to end.
            grace_s: after this long the process is ended without asking.

        Raises:
            ConfigError: the run has no gateway.
        """
        gateway = run.gateway()
        pidfd = None if gateway is None else gateway.open_pidfd()
        if pidfd is None:
            raise ConfigError(f"the gateway of run {run.run_id} is gone; nothing to work for")
        self._pidfd = pidfd
        self._on_gone = on_gone
        self._grace_s = grace_s
        threading.Thread(target=self._watch, name="gateway-watch", daemon=True).start()

    def _watch(self) -> None:
        select.select([self._pidfd], [], [])
        logger.info("the gateway is gone; ending")
        self._on_gone()
        threading.Event().wait(self._grace_s)
        os._exit(EXIT_ORPHANED)
