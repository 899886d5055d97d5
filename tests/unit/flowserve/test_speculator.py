"""When drafts are checked: prices from times, odds from acceptance."""

from __future__ import annotations

from array import array

from xdeepserve.flowserve.draft_price import NUM_TRIALS, RETRY_INTERVAL, DraftPrice
from xdeepserve.flowserve.speculator import FIRST_RETRY, DraftRecord, Speculator

IDS = array("i", [1, 2, 3])
MAX_DRAFTS = 4


class SevenProposer:
    """Always guesses sevens."""

    def propose(self, token_ids: array[int], *, limit: int) -> tuple[int, ...]:
        return (7,) * limit


def quotes(price: DraftPrice, num_seqs: int, count: int) -> list[float | None]:
    return [price.quote(num_seqs) for _ in range(count)]


def measured(*, num_seqs: int, plain_s: float, drafted_s: float, num_drafts: int) -> DraftPrice:
    price = DraftPrice()
    for _ in range(NUM_TRIALS):
        price.record(num_seqs=num_seqs, num_drafts=0, duration_s=plain_s)
    for _ in range(NUM_TRIALS):
        price.record(num_seqs=num_seqs, num_drafts=num_drafts, duration_s=drafted_s)
    return price


def test_the_price_is_what_a_draft_costs_in_plain_tokens() -> None:
    # 2 tokens in 10 ms; 8 drafts make the step 4 ms longer: 0.8 tokens, a tenth for each.
    price = measured(num_seqs=2, plain_s=0.010, drafted_s=0.014, num_drafts=8)
    quote = price.quote(2)
    assert quote is not None
    assert abs(quote - 0.1) < 1e-9


def test_nothing_is_drafted_before_plain_steps_are_measured() -> None:
    price = DraftPrice()
    assert price.quote(1) is None
    for _ in range(NUM_TRIALS):
        price.record(num_seqs=1, num_drafts=0, duration_s=0.01)
    assert price.quote(1) == 0.0
    assert price.quote(2) is None


def test_plain_steps_are_measured_again() -> None:
    price = measured(num_seqs=1, plain_s=0.01, drafted_s=0.02, num_drafts=4)
    assert quotes(price, 1, 2 * RETRY_INTERVAL).count(None) == 2


def test_one_hiccup_changes_little() -> None:
    price = measured(num_seqs=1, plain_s=0.01, drafted_s=0.014, num_drafts=4)
    for _ in range(50):
        price.record(num_seqs=1, num_drafts=4, duration_s=0.014)
        price.record(num_seqs=1, num_drafts=0, duration_s=0.01)
    price.record(num_seqs=1, num_drafts=4, duration_s=5.0)
    price.record(num_seqs=1, num_drafts=0, duration_s=5.0)
    quote = price.quote(1)
    assert quote is not None
    assert 0.1 < quote < 0.3


def test_a_clock_that_stands_still_measures_nothing() -> None:
    price = DraftPrice()
    for _ in range(NUM_TRIALS):
        price.record(num_seqs=1, num_drafts=0, duration_s=0.0)
    assert price.quote(1) is None


def ready(drafted_s: float) -> Speculator:
    """A speculator that has measured sequence alone at 10 ms, and with four drafts."""
    speculator = Speculator(SevenProposer(), num_speculative_tokens=MAX_DRAFTS)
    for num_drafts, duration_s in ((0, 0.01), (MAX_DRAFTS, drafted_s)):
        for _ in range(NUM_TRIALS):
            speculator.record_step(num_seqs=1, num_drafts=num_drafts, duration_s=duration_s)
    assert speculator.begin_step(num_seqs=1)
    return speculator


def propose(speculator: Speculator, record: DraftRecord, limit: int = 9) -> tuple[int, ...]:
    return speculator.propose(record, IDS, limit=limit)


def test_drafts_are_as_many_as_configured_and_as_there_is_room_for() -> None:
    speculator, record = ready(drafted_s=0.011), DraftRecord()
    assert propose(speculator, record) == (7,) * MAX_DRAFTS
    assert propose(speculator, record, limit=2) == (7, 7)
    assert propose(speculator, record, limit=0) == ()


def test_a_request_whose_drafts_fail_stops_drafting_and_others_go_on() -> None:
    speculator, bad, good = ready(drafted_s=0.018), DraftRecord(), DraftRecord()  # price 0.2
    for _ in range(20):
        if drafts := propose(speculator, bad):
            speculator.record_drafts(bad, num_drafts=len(drafts), num_accepted=0)
        speculator.record_drafts(good, num_drafts=MAX_DRAFTS, num_accepted=MAX_DRAFTS)
    assert propose(speculator, bad) == ()
    assert propose(speculator, good) == (7,) * MAX_DRAFTS


def test_luck_is_tried_again_with_one_draft_and_ever_more_rarely() -> None:
    speculator, record = ready(drafted_s=0.05), DraftRecord()  # price 1: nothing pays
    speculator.record_drafts(record, num_drafts=MAX_DRAFTS, num_accepted=0)
    sizes = []
    for _ in range(4 * FIRST_RETRY):
        drafts = propose(speculator, record)
        sizes.append(len(drafts))
        if drafts:
            speculator.record_drafts(record, num_drafts=len(drafts), num_accepted=0)
    assert [i + 1 for i, size in enumerate(sizes) if size] == [FIRST_RETRY, 3 * FIRST_RETRY]
    assert max(sizes) == 1
