"""Entry of the supervisor process.

gateway gone  -> stop all workers at once, remove the run directory and its shared memory
SIGTERM       -> end with code 1, leave the workers running for the next supervisor
StopAll       -> drain and stop all workers, then end
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from setproctitle import setproctitle

from xdeepserve.errors import XDeepServeError
from xdeepserve.launch.failure_note import leave_note
from xdeepserve.launch.logs import setup_logging
from xdeepserve.launch.run_dir import IdentityLock, RunDirectory, run_id_of
from xdeepserve.launch.service import load_service
from xdeepserve.launch.supervisor.messages import SUPERVISOR_NAME
from xdeepserve.launch.supervisor.supervisor import Supervisor
from xdeepserve.launch.worker.exit_codes import EXIT_FAILED, EXIT_OK

logger = logging.getLogger("xdeepserve.launch.supervisor")

TITLE = f"xds:{SUPERVISOR_NAME}"


def main(arguments: list[str]) -> int:
    """Supervise the run in the given directory; returns the exit code."""
    setproctitle(TITLE)
    path = Path(arguments[0])
    setup_logging(TITLE, run_id=run_id_of(path))
    try:
        run = RunDirectory.open(path)
        # Never released: there is one supervisor at a time.
        IdentityLock(run.lock_path(SUPERVISOR_NAME))
        return _work(run)
    except XDeepServeError as exc:
        logger.error("the supervisor ends: %s", exc.message)
        return EXIT_FAILED


def _work(run: RunDirectory) -> int:
    try:
        return asyncio.run(_supervise(run))
    except Exception as exc:  # loop top: the gateway can read why it ends
        leave_note(run, SUPERVISOR_NAME, exc)
        raise


async def _supervise(run: RunDirectory) -> int:
    """Returns EXIT_OK when all workers have ended."""
    loop = asyncio.get_running_loop()
    supervisor = Supervisor(run, load_service(run))
    supervising = asyncio.create_task(supervisor.run())
    loop.add_signal_handler(signal.SIGTERM, supervising.cancel)
    orphaned = asyncio.create_task(_wait_for_gateway_end(run))
    await asyncio.wait({supervising, orphaned}, return_when=asyncio.FIRST_COMPLETED)
    if orphaned.done() and not supervising.done():
        orphaned.result()  # Not to be able to watch the gateway is not its end.
        logger.info("the gateway is gone; stopping all workers")
        supervisor.begin_stop(drain_timeout_s=0.0)
    try:
        await supervising
    except asyncio.CancelledError:
        logger.info("the supervisor ends; the workers go on")
        return EXIT_FAILED
    finally:
        orphaned.cancel()
    if orphaned.done():
        run.remove()
    return EXIT_OK


async def _wait_for_gateway_end(run: RunDirectory) -> None:
    """Return when the gateway is gone; at once when it is already."""
    gateway = run.gateway()
    pidfd = None if gateway is None else gateway.open_pidfd()
    if pidfd is None:
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
