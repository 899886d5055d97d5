"""A request as the answering rank sees it: views into the asker's slot, and the ways to answer.

The views are valid until the request is answered; after that the asker may write there again.
`Batch` is compiled: its verbs are documented in `xdeepserve._xccl`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xdeepserve._xccl import Batch

__all__ = ["F32", "I32", "INT8_ROWS", "Array", "Batch"]

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

INT8_ROWS = 2
"""Number of the row type that has scales."""
