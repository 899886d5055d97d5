"""Every operator over the shapes of the compared models, for `benchmarks/bench_ops.py`."""
