"""Choice of the operator backend by name."""

from __future__ import annotations

from xdeepserve.errors import ConfigError
from xdeepserve.ops.contract import Ops


def get_ops(name: str = "cpu", *, num_threads: int = 0) -> Ops:
    """The operator backend `name`: "cpu" (native) or "reference" (NumPy, float32, the oracle).

    Args:
        num_threads: operator threads of the cpu backend; 0 = XDEEPSERVE_NUM_THREADS, or one per
            core this process may use.

    Raises:
        ConfigError: unknown name, or the native core is missing.
    """
    if name == "reference":
        from xdeepserve.ops.reference import ReferenceOps

        return ReferenceOps()
    if name == "cpu":
        from xdeepserve.ops.cpu import CpuOps

        return CpuOps(num_threads=num_threads)
    raise ConfigError(f"operator backend {name!r} is unknown; use cpu or reference")
