"""Exit codes of worker processes."""

from __future__ import annotations

from typing import Final

EXIT_OK: Final = 0
"""Asked to end, or drained."""

EXIT_FAILED: Final = 1
"""The body did not start, or its loop ended."""

EXIT_CONFIG: Final = 2
"""The run directory or the configuration is wrong."""

EXIT_ORPHANED: Final = 3
"""The gateway is gone and the process did not end when asked."""

EXIT_NAME_TAKEN: Final = 4
"""Another process of the run has this worker's name."""
