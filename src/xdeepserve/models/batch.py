"""ForwardBatch: everything the model needs to know of one step. Built by flowserve."""

from __future__ import annotations

from dataclasses import dataclass

from xdeepserve.ops import I32, AttentionBatch


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step (or of one microbatch of it).

    Attributes:
        token_ids: [T] int32.
        attention: sequence boundaries, positions, slots and block tables.
        logits_rows: [B'] int32; rows of T whose logits are wanted (last token of each sequence
            that samples this step).
    """

    token_ids: I32
    attention: AttentionBatch
    logits_rows: I32
