"""A request as the answering rank sees it: views into the asker's slot, and the ways to answer.

The views are valid until the request is answered; after that the asker may write there again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from xdeepserve import _xccl
from xdeepserve.xccl.layout import Tag

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

ROW_DTYPES: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(name) for name in ("float32", "uint16", "int8", "uint8")
)
"""By row type: float32, bfloat16 bits, int8 with one scale per row, bytes."""

INT8_ROWS = 2


def view_rows(base: Array, *, row_type: int, num_rows: int, row_bytes: int, offset: int) -> Array:
    """[num_rows, width] view of rows in a segment."""
    dtype = ROW_DTYPES[row_type]
    shape = (num_rows, row_bytes // dtype.itemsize)
    return np.ndarray(shape, dtype, base.data, offset)


class Batch:
    """One request, to be answered exactly once by `reply`, `commit` or `refuse`.

    Attributes:
        tag: names the exchange.
        kind: the asker's number for what it wants; FORWARD for a trampoline.
        source_rank: the asker.
        num_rows: rows sent.
        reply_rows: rows the asker expects back; 0 where it does not say.
    """

    __slots__ = (
        "_base",
        "_own",
        "_port",
        "_request",
        "kind",
        "num_rows",
        "reply_rows",
        "source_rank",
        "tag",
    )

    def __init__(self, port: _xccl.Port, request: _xccl.Incoming, base: Array, own: Array) -> None:
        self._port = port
        self._request = request
        self._base = base
        self._own = own
        self.tag = Tag(*request.tag)
        self.kind = request.kind
        self.source_rank = request.source_rank
        self.num_rows = request.num_rows
        self.reply_rows = request.reply_rows

    @property
    def source_incarnation(self) -> int:
        """The life of the asker that sent it."""
        return self._request.source_incarnation

    @property
    def meta(self) -> I32:
        """[num_meta] int32 view of the metadata."""
        request = self._request
        return np.ndarray((request.num_meta,), np.int32, self._base.data, request.meta_offset)

    @property
    def pairs(self) -> I32:
        """[P, 2] view of (row, expert) of a routed request, sorted by expert."""
        return self.meta.reshape(-1, 2)

    @property
    def rows(self) -> Array:
        """[num_rows, width] view: float32, uint16 (bfloat16 bits), int8 or uint8."""
        request = self._request
        return view_rows(
            self._base,
            row_type=request.row_type,
            num_rows=request.num_rows,
            row_bytes=request.row_bytes,
            offset=request.rows_offset,
        )

    @property
    def scales(self) -> F32 | None:
        """[num_rows] float32 view of int8 rows' scales; None for other rows."""
        request = self._request
        if request.row_type != INT8_ROWS:
            return None
        shape = (request.num_rows,)
        return np.ndarray(shape, np.float32, self._base.data, request.scales_offset)

    def reply(self, rows: Array, *, scales: F32 | None = None, quantize: bool = False) -> bool:
        """Copies the answer to where the asker looks for it, and wakes the asker.

        Args:
            rows: [R, width] float32, uint16 (bfloat16 bits), int8 or uint8, C-contiguous.
            scales: [R] float32, with int8 rows.
            quantize: send float32 or bfloat16 rows as int8 with one scale each.

        Returns:
            False when the asker's life has ended, so that nobody waits.

        Raises:
            ValueError: larger than reply_bytes, or answered already.
        """
        return self._port.reply_rows(self._request, rows, scales, quantize)

    def answer_buffer(self, num_rows: int, width: int) -> F32 | None:
        """[num_rows, width] float32 to compute the answer in place; then `commit`.

        None when the asker's life has ended.
        """
        place = self._port.reply_place(self._request, num_rows, width * 4, 0)
        if place is None:
            return None
        return np.ndarray((num_rows, width), np.float32, self._own.data, place[1])

    def commit(self, num_rows: int, width: int) -> bool:
        """Publishes what was computed in `answer_buffer(num_rows, width)`; as `reply`."""
        return self._port.commit_reply(self._request, num_rows, width * 4, 0)

    def refuse(self, detail: int = 0) -> bool:
        """Answers that this rank does not serve what was asked; `detail` (u32) says why."""
        return self._port.refuse_request(self._request, detail)

    def __repr__(self) -> str:
        return f"Batch(from {self.source_rank}, {self.tag}, kind {self.kind}, {self.num_rows} rows)"
