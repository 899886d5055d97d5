"""OwnExperts: the slots of an exchange that the asker computes beside those it asks of others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xdeepserve.models.moe import run_sorted
from xdeepserve.models.units import ExpertUnit
from xdeepserve.ops import F32, I32
from xdeepserve.transformerless.legs import ExpertLeg

SKIP = np.int32(-1)


@dataclass(frozen=True, slots=True)
class OwnOutputs:
    """Computed rows. outputs: [R, H]; row_of_slot: [T, K], -1 = a slot of others."""

    outputs: F32
    row_of_slot: I32


class OwnExperts:
    """One exchange's part of the asker: planned at once, computed while the others compute."""

    def __init__(self, topk_ids: I32, is_own: NDArray[np.bool_]) -> None:
        """Split topk_ids [T, K] by is_own [E]."""
        self._topk_ids = topk_ids
        is_own_slot = is_own[topk_ids] & (topk_ids >= 0)
        self._own_ids = np.where(is_own_slot, topk_ids, SKIP)
        self.others_ids: I32 = np.where(is_own_slot, SKIP, topk_ids)
        self._computed: OwnOutputs | None = None

    def compute(self, unit: ExpertUnit, hidden_states: F32) -> None:
        """Compute the own slots, unless that is done already."""
        if self._computed is None:
            outputs, permutation = run_sorted(unit, hidden_states, self._own_ids)
            self._computed = OwnOutputs(outputs, permutation.row_of_slot)

    def combine(self, leg: ExpertLeg, unit: ExpertUnit, topk_weights: F32) -> F32:
        """[T, H]: own and others' slots, summed in slot order from 0 as if one had all."""
        assert self._computed is not None, "computed before the answers are waited for"
        num_slots = self._topk_ids.size
        own, row_of_slot = self._computed.outputs, self._computed.row_of_slot
        rows = np.empty((num_slots + len(own), own.shape[1]), np.float32)
        rows[num_slots:] = own
        leg.gather(rows[:num_slots])
        place = np.arange(num_slots, dtype=np.int32).reshape(row_of_slot.shape)
        place = np.where(row_of_slot >= 0, row_of_slot + np.int32(num_slots), place)
        place = np.where(self._topk_ids >= 0, place, SKIP)
        return unit.ops.combine_topk(rows, place, topk_weights)
