"""What all ranks of a run agree on: sizes of slots, rings and windows, and the tag of an exchange.

Byte layouts are drawn in `native/xccl/layout.h` and `native/xccl/messages.h`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from xdeepserve import _xccl
from xdeepserve.errors import SegmentError

LINE_BYTES = 64


class Tag(NamedTuple):
    """Names one exchange; echoed by whoever answers.

    Attributes:
        epoch: 0 to 2**32 - 1; grows when rows are sent again elsewhere.
        step_idx: 0 to 2**64 - 1.
        layer_idx: 0 to 65535.
        microbatch_idx: 0 to 65535.
    """

    epoch: int
    step_idx: int
    layer_idx: int
    microbatch_idx: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of a run; every rank must give the same. Untouched pages cost no memory.

    Attributes:
        max_ranks: ranks are 0 to max_ranks - 1; places for ranks that join later included.
        p2p_slots: chunks under way per ordered pair; a power of two, 2 to 1024.
        p2p_slot_bytes: bytes of a chunk; a multiple of 64.
        row_slots: requests under way per ordered pair; a power of two, up to 64.
        request_bytes: largest request: metadata, scales and rows; a multiple of 64.
        reply_bytes: largest reply: scales and rows; a multiple of 64.
        window_bytes: size of each rank's put/get window; a multiple of 64, may be 0.
    """

    max_ranks: int = 8
    p2p_slots: int = 16
    p2p_slot_bytes: int = 64 << 10
    row_slots: int = 4
    request_bytes: int = 1 << 20
    reply_bytes: int = 1 << 20
    window_bytes: int = 64 << 10

    @classmethod
    def for_rows(
        cls, *, max_ranks: int, max_rows: int, hidden_size: int, top_k: int, row_slots: int = 4
    ) -> Layout:
        """Sizes that hold float32 exchanges of up to max_rows tokens.

        Args:
            max_ranks: as in Layout.
            max_rows: most tokens of one exchange.
            hidden_size: H, items per row.
            top_k: most (token, expert) pairs per token on one rank.
            row_slots: as in Layout.
        """
        row_bytes = hidden_size * 4
        meta_bytes = 2 * 4 * max_rows * top_k
        return cls(
            max_ranks=max_ranks,
            row_slots=row_slots,
            request_bytes=round_to_line(meta_bytes) + round_to_line(max_rows * (row_bytes + 4)),
            reply_bytes=round_to_line(max_rows * top_k * (row_bytes + 4)) + LINE_BYTES,
        )

    @property
    def segment_bytes(self) -> int:
        """Bytes of one rank's segment, all pages touched.

        Raises:
            SegmentError: a size is out of range.
        """
        return self.to_native().segment_bytes

    def to_native(self) -> _xccl.LayoutParams:
        """The same numbers for the compiled core; range checks follow where they are used."""
        try:
            return _xccl.LayoutParams(
                self.max_ranks,
                self.p2p_slots,
                self.p2p_slot_bytes,
                self.row_slots,
                self.request_bytes,
                self.reply_bytes,
                self.window_bytes,
            )
        except TypeError as error:
            raise SegmentError(f"{self} holds a number that is negative or too large") from error


def round_to_line(num_bytes: int) -> int:
    """`num_bytes` rounded up to whole cache lines."""
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES
