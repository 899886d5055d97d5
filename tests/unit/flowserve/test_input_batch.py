"""From plan to arrays: positions, slots, block tables and microbatch borders."""

from __future__ import annotations

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
