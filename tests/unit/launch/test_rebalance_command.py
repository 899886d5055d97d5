"""`xds rebalance`: what it says has moved."""

from __future__ import annotations

import pytest

from xdeepserve.launch.placement import Placement
from xdeepserve.launch.rebalance import describe
from xdeepserve.launch.supervisor.messages import Membership


def membership(epoch: int, ffn: tuple[int, ...], row: list[int]) -> Membership:
    placement = Placement(epoch=epoch, ffn=ffn, expert=(0, 1), table=[row])
    return Membership(epoch=epoch, run_id="a", counts={}, members=(), placement=placement)


@pytest.mark.parametrize(
    ("ffn", "row", "text"),
    [
        ((0,), [0, 1], "the experts stay where they are: placement 4"),
        ((0, 1), [0, 1], "the experts stay where they are: placement 4"),
        ((0,), [1, 0], "the experts have moved: placement 3 -> 4"),
    ],
)
def test_only_experts_that_moved_have_moved(
    ffn: tuple[int, ...], row: list[int], text: str
) -> None:
    assert describe(membership(3, (0,), [0, 1]), membership(4, ffn, row)) == text
