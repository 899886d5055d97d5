"""From plan to arrays: positions, slots, block tables and microbatch borders."""

from __future__ import annotations

import random
from array import array

import pytest

from xdeepserve.flowserve.input_batch import build_forward_batch, split_microbatches
from xdeepserve.flowserve.step import ScheduledRequest
from xdeepserve.messages import SamplingParams


def share(token_ids: list[int], computed: int, count: int, blocks: list[int]) -> ScheduledRequest:
    return ScheduledRequest(
        request_id="r",
        params=SamplingParams(max_tokens=1),
        token_ids=array("i", token_ids),
        num_prompt_tokens=len(token_ids),
        num_computed_tokens=computed,
        num_scheduled_tokens=count,
        block_ids=array("i", blocks),
        samples=computed + count == len(token_ids),
    )


def test_chunks_and_decodes_mix_in_one_batch() -> None:
    batch = build_forward_batch(
        [
            share([10, 11, 12, 13, 14, 15, 16], 3, 3, [7, 2, 9]),
            share([20, 21, 22], 2, 1, [5]),
            share([30], 0, 1, [1]),
        ],
        block_size=4,
    )
    assert batch.token_ids.tolist() == [13, 14, 15, 22, 30]
    assert batch.attention.query_start.tolist() == [0, 3, 4, 5]
    assert batch.attention.seq_lens.tolist() == [6, 3, 1]
    assert batch.attention.positions.tolist() == [3, 4, 5, 2, 0]
    assert batch.attention.slot_mapping.tolist() == [31, 8, 9, 22, 4]
    assert batch.attention.block_tables.tolist() == [[7, 2], [5, -1], [1, -1]]
    assert batch.logits_rows.tolist() == [3, 4]
    arrays = [batch.token_ids, batch.logits_rows, *_arrays(batch.attention)]
    assert {str(a.dtype) for a in arrays} == {"int32"}
    assert all(a.flags.c_contiguous for a in arrays)


def test_drafts_are_rows_behind_the_last_token() -> None:
    drafting = share([20, 21, 22], 2, 1, [5, 3])._replace(draft_token_ids=(40, 41, 42))
    batch = build_forward_batch([share([30], 0, 1, [1]), drafting], block_size=4)
    assert batch.token_ids.tolist() == [30, 22, 40, 41, 42]
    assert batch.attention.seq_lens.tolist() == [1, 6]
    assert batch.attention.positions.tolist() == [0, 2, 3, 4, 5]
    assert batch.attention.slot_mapping.tolist() == [4, 22, 23, 12, 13]
    assert batch.logits_rows.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_every_token_has_the_slot_of_its_position(block_size: int) -> None:
    rng = random.Random(block_size)
    items = []
    for _ in range(40):
        token_ids = rng.choices(range(1000), k=rng.randint(1, 70))
        computed = rng.randrange(len(token_ids))
        count = rng.choice([1, rng.randint(1, len(token_ids) - computed)])
        items.append(share(token_ids, computed, count, rng.sample(range(200), 71)))
    batch = build_forward_batch(items, block_size)
    expected = [
        (
            item.token_ids[position],
            position,
            item.block_ids[position // block_size] * block_size + position % block_size,
        )
        for item in items
        for position in range(
            item.num_computed_tokens, item.num_computed_tokens + item.num_scheduled_tokens
        )
    ]
    attention = batch.attention
    made = zip(
        batch.token_ids.tolist(),
        attention.positions.tolist(),
        attention.slot_mapping.tolist(),
        strict=True,
    )
    assert list(made) == expected


def test_a_step_may_sample_nothing() -> None:
    batch = build_forward_batch([share([20, 21, 22], 0, 2, [5])], block_size=4)
    assert batch.logits_rows.shape == (0,)


def _arrays(attention: object) -> list[object]:
    names = ("query_start", "seq_lens", "block_tables", "positions", "slot_mapping")
    return [getattr(attention, name) for name in names]


def test_arrays_do_not_borrow_from_the_plan() -> None:
    item = share([20, 21, 22], 2, 1, [5])
    batch = build_forward_batch([item], block_size=4)
    item.token_ids.append(23)
    item.block_ids.append(6)
    assert batch.token_ids.tolist() == [22]


@pytest.mark.parametrize(
    ("tokens", "count", "sizes"),
    [
        ([1, 1, 1, 1], 2, [2, 2]),
        ([1, 1, 1], 2, [1, 2]),
        ([9, 1, 1], 2, [1, 2]),
        ([1, 1, 9], 2, [2, 1]),
        ([1, 1], 3, [1, 1]),
        ([4], 2, [1]),
        ([1, 1, 1], 1, [3]),
    ],
)
def test_microbatches_are_even_by_tokens(tokens: list[int], count: int, sizes: list[int]) -> None:
    items = [share(list(range(n)), 0, n, [0, 1, 2]) for n in tokens]
    parts = split_microbatches(items, count)
    assert [len(part) for part in parts] == sizes
    assert [item for part in parts for item in part] == items
