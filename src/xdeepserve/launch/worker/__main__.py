"""Entry of a worker process: takes its name, pins it, and runs a `WorkerProcess`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

import msgspec
from setproctitle import setproctitle

from xdeepserve.errors import ConfigError, XDeepServeError
from xdeepserve.launch.failure_note import leave_note
from xdeepserve.launch.logs import setup_logging
from xdeepserve.launch.plan import WorkerSpec
from xdeepserve.launch.run_dir import IdentityLock, NameTaken, RunDirectory, run_id_of
from xdeepserve.launch.service import load_service
from xdeepserve.launch.worker.body import WorkerContext, load_body_factory
from xdeepserve.launch.worker.exit_codes import EXIT_CONFIG, EXIT_FAILED, EXIT_NAME_TAKEN
from xdeepserve.launch.worker.worker_process import WorkerProcess

logger = logging.getLogger("xdeepserve.launch.worker")


def main(arguments: list[str]) -> int:
    """Be the worker that the arguments name; returns the exit code."""
    run_dir, spec_json, incarnation = arguments
    spec = msgspec.json.decode(spec_json, type=WorkerSpec)
    setproctitle(spec.title)
    setup_logging(spec.title, run_id=run_id_of(Path(run_dir)))
    try:
        run = RunDirectory.open(Path(run_dir))
        # Never released: the name is free when the process has ended.
        IdentityLock(run.lock_path(spec.name))
        return _work(run, spec, int(incarnation))
    except ConfigError as exc:
        return _fail(spec, exc, EXIT_CONFIG)
    except NameTaken as exc:
        return _fail(spec, exc, EXIT_NAME_TAKEN)
    except XDeepServeError as exc:
        return _fail(spec, exc, EXIT_FAILED)


def _work(run: RunDirectory, spec: WorkerSpec, incarnation: int) -> int:
    if spec.cores:
        os.sched_setaffinity(0, spec.cores)
    try:
        context = WorkerContext(run, load_service(run), spec, incarnation)
        body = load_body_factory(context.service, spec.role)(context)
        # Not asyncio.run: it would wait for threads that still load a model.
        loop = asyncio.new_event_loop()
        return loop.run_until_complete(WorkerProcess(context, body).run())
    except Exception as exc:  # loop top: the supervisor can read why it ends
        leave_note(run, spec.name, exc)
        raise


def _fail(spec: WorkerSpec, error: XDeepServeError, code: int) -> int:
    logger.error("%s ends with code %d: %s", spec.name, code, error.message)
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    logging.shutdown()
    # A thread that still loads a model must not delay the end.
    os._exit(code)
