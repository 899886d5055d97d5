"""N-gram proposer: against a search that is too simple to be wrong."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from xdeepserve.flowserve.ngram_proposer import MAX_NGRAM, MIN_NGRAM, NgramProposer

few_ids = st.lists(st.integers(0, 3), max_size=40)
# Ids whose bytes look like parts of each other's.
byte_traps = st.lists(st.sampled_from([0, 1, 256, 257, 65536, 16777216, 16843009]), max_size=40)


def expected(ids: list[int], limit: int) -> tuple[int, ...]:
    """The latest earlier place of the longest suffix, copied id by id."""
    for size in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        for start in range(len(ids) - size - 1, -1, -1):
            if ids[start : start + size] == ids[-size:]:
                out = list(ids)
                for source in range(start + size, start + size + limit):
                    out.append(out[source])
                return tuple(out[len(ids) :])
    return ()


@given(st.one_of(few_ids, byte_traps), st.integers(1, 6))
def test_copies_from_the_latest_place_of_the_longest_suffix(ids: list[int], limit: int) -> None:
    assert NgramProposer().propose(array("i", ids), limit=limit) == expected(ids, limit)


def test_a_loop_goes_on() -> None:
    ids = array("i", [9, 5, 6, 5, 6])
    assert NgramProposer().propose(ids, limit=5) == (5, 6, 5, 6, 5)


def test_nothing_repeated_means_nothing_proposed() -> None:
    proposer = NgramProposer()
    for ids in ([], [5], [5, 5], [5, 6, 7, 6]):
        assert proposer.propose(array("i", ids), limit=4) == ()
