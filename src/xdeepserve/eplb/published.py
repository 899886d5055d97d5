"""The published EPLB algorithm (DeepSeek), as the yardstick and the fallback of `place`.

Hierarchical where the expert groups divide among the nodes: pack groups to nodes, replicate within
a node, pack replicas to ranks. Otherwise the same with one group and one node. All layers advance
together, one array operation per placed item.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xdeepserve.eplb.placement import ExpertPlacement
from xdeepserve.eplb.rows import F64, I64, replicate
from xdeepserve.errors import ConfigError


def balanced_packing(weight: F64, num_packs: int) -> tuple[I64, I64]:
    """Greedy packing with equally many items in each pack.

    Args:
        weight: [B, n]; n divisible by num_packs.
        num_packs: number of packs.

    Returns:
        pack_of_item [B, n] and position_in_pack [B, n].
    """
    num_rows, num_items = weight.shape
    capacity = num_items // num_packs
    pack = np.broadcast_to(np.arange(num_items), weight.shape).copy()
    position = np.zeros_like(pack)
    if capacity == 1:
        return pack, position
    rows = np.arange(num_rows)
    load = np.zeros((num_rows, num_packs))
    used = np.zeros((num_rows, num_packs), np.int64)
    for items in np.argsort(-weight, axis=1, kind="stable").T:
        chosen = np.argmin(np.where(used < capacity, load, np.inf), axis=1)
        pack[rows, items] = chosen
        position[rows, items] = used[rows, chosen]
        load[rows, chosen] += weight[rows, items]
        used[rows, chosen] += 1
    return pack, position


def pack_groups(load: F64, num_groups: int, num_nodes: int) -> I64:
    """[L, E] experts in node order: those of node 0 first; a group stays together."""
    num_layers, num_experts = load.shape
    per_group = load.reshape(num_layers, num_groups, -1).sum(axis=2)
    node, position = balanced_packing(per_group, num_nodes)
    order = np.argsort(node * (num_groups // num_nodes) + position, axis=1)
    return expand_groups(order, num_experts // num_groups)


def expand_groups(group_order: I64, group_size: int) -> I64:
    """[L, G] groups in order -> [L, E] experts in order."""
    experts = group_order[:, :, None] * group_size + np.arange(group_size)
    return experts.reshape(group_order.shape[0], -1)


def rebalance_experts(
    load: NDArray[np.generic], num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> ExpertPlacement:
    """Replicate and place experts as the published algorithm does.

    Args:
        load: [L, E] tokens per logical expert.
        num_replicas: P, all replicas of a layer; a multiple of num_ranks, at least E.
        num_groups: expert groups of group-limited routing; 1 = none.
        num_nodes: hosts with a fast network inside.
        num_ranks: ranks on all nodes together; a multiple of num_nodes.

    Raises:
        ConfigError: the numbers do not divide.

    Source:
        github.com/deepseek-ai/EPLB. Sums are float64 there float32; ties go to the lower index.
    """
    loads = np.asarray(load, np.float64)
    num_layers, num_experts = loads.shape
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    _check_divisible(num_experts, num_replicas, num_groups, num_nodes, num_ranks)
    expert_of = pack_groups(loads, num_groups, num_nodes).reshape(num_layers * num_nodes, -1)
    row_load = np.repeat(loads, num_nodes, axis=0)
    row_load = np.take_along_axis(row_load, expert_of, 1)  # [L * nodes, E / nodes]
    counts, replica_of = replicate(row_load, num_replicas // num_nodes)
    share = np.take_along_axis(row_load / counts, replica_of, 1)
    rank, position = balanced_packing(share, num_ranks // num_nodes)
    order = np.argsort(rank * (num_replicas // num_ranks) + position, axis=1)
    placed = np.take_along_axis(expert_of, np.take_along_axis(replica_of, order, 1), 1)
    return ExpertPlacement.from_physical(
        placed.reshape(num_layers, num_replicas), num_experts=num_experts, num_ranks=num_ranks
    )


def _check_divisible(
    num_experts: int, num_replicas: int, num_groups: int, num_nodes: int, num_ranks: int
) -> None:
    for value, divisor, what in (
        (num_experts, num_groups, "num_experts by num_groups"),
        (num_replicas, num_ranks, "num_replicas by num_ranks"),
        (num_ranks, num_nodes, "num_ranks by num_nodes"),
    ):
        if divisor < 1 or value % divisor:
            raise ConfigError(f"expert placement: {value} is not divisible by {divisor} ({what})")
    if num_replicas < num_experts:
        raise ConfigError(f"num_replicas={num_replicas} must be at least {num_experts} experts")
