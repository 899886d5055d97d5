"""A worker process: `python -m xdeepserve.launch.worker RUN_DIR NAME INCARNATION`.

The base owns title, cores, log, control socket, signals and the watch on the gateway; what the
worker computes is its `WorkerBody`.
"""
