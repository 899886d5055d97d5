"""Steps that workers cannot exchange are refused before a worker starts, with what to change."""

from __future__ import annotations

import pytest

from xdeepserve.errors import ConfigError
from xdeepserve.launch.deployment import Deployment
from xdeepserve.launch.deployment_file import parse_deployment
from xdeepserve.launch.fabric import Fabric, layout_of
from xdeepserve.launch.plan import ModelShape
from xdeepserve.launch.room import Room, check_room, pair_bytes

SHAPE = ModelShape(name="moe", num_experts=8, has_ffn=True, num_layers=2, hidden_size=64, top_k=2)
PLENTY = Room(shm_bytes=1 << 50, memory_bytes=1 << 50)
ROLES = "roles: {attention: {count: 2}, ffn: {count: 1}, expert: {count: 3}}"
NUM_PAIRS = 2 * (1 + 3)


def deployment(max_rows: int = 512, roles: str = ROLES) -> Deployment:
    limits = f"limits: {{max_num_batched_tokens: {max_rows}}}"
    return parse_deployment(f"{roles}\n{limits}".encode())


@pytest.mark.parametrize(
    ("max_rows", "roles", "part"),
    [
        (10**9, ROLES, "request_bytes=276000000000 must lie in [64, 4294967296]"),
        (10**18, ROLES, "is negative or too large"),
        (64, "roles: {attention: {max_count: 250}, ffn: {count: 4}}", "max_ranks=262 must lie in"),
    ],
)
def test_sizes_beyond_what_xccl_can_exchange(max_rows: int, roles: str, part: str) -> None:
    wrong = deployment(max_rows, roles)
    with pytest.raises(ConfigError) as caught:
        check_room(wrong, SHAPE, PLENTY)
    assert part in caught.value.message
    assert f"lower limits.max_num_batched_tokens={max_rows}" in caught.value.message
    with pytest.raises(ConfigError, match="max_count"):
        Fabric.of("00000000", wrong, SHAPE)


def test_groups_that_exchange_nothing_need_no_room() -> None:
    check_room(deployment(10**9, "roles: {attention: {count: 2}}"), SHAPE, Room(0, 0))


def test_one_segment_must_fit_with_all_places() -> None:
    num_bytes = layout_of(deployment(), SHAPE).segment_bytes
    check_room(deployment(), SHAPE, Room(num_bytes, 1 << 50))
    with pytest.raises(ConfigError, match=r"places for 14 workers, may take .* /dev/shm has"):
        check_room(deployment(), SHAPE, Room(num_bytes - 1, 1 << 50))


def test_all_slots_in_use_must_fit_memory() -> None:
    num_bytes = NUM_PAIRS * pair_bytes(layout_of(deployment(), SHAPE))
    check_room(deployment(), SHAPE, Room(1 << 50, num_bytes))
    with pytest.raises(ConfigError, match=r"8 pairs of workers may take .* memory has"):
        check_room(deployment(), SHAPE, Room(1 << 50, num_bytes - 1))


def test_all_slots_in_use_must_fit_dev_shm() -> None:
    roles = "roles: {attention: {count: 8, max_count: 8}, expert: {count: 8, max_count: 8}}"
    many = deployment(roles=roles)
    num_bytes = 64 * pair_bytes(layout_of(many, SHAPE))
    check_room(many, SHAPE, Room(num_bytes, 1 << 50))
    with pytest.raises(ConfigError, match=r"64 pairs of workers may take .* /dev/shm has"):
        check_room(many, SHAPE, Room(num_bytes - 1, 1 << 50))


def test_the_room_of_this_machine() -> None:
    room = Room.of_this_machine()
    assert room.shm_bytes > 0
    assert room.memory_bytes > 0
