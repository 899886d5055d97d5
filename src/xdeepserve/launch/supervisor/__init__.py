"""The supervisor process: `python -m xdeepserve.launch.supervisor RUN_DIR`.

Starts, watches, restarts, scales and stops the workers of one run, and tells their membership to
the gateway. It computes nothing and may die at any time: the next one finds the workers running.
"""
