"""MicrobatchTuner: measures both, uses the faster one at each size, notices when that changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from xdeepserve.flowserve.microbatch_tuner import NUM_TRIALS, RETRY_INTERVAL, MicrobatchTuner

Cost = Callable[[int, int], float]
"""(tokens, microbatches) -> seconds of a step."""


def overlap_pays_from(num_tokens: int) -> Cost:
    return lambda tokens, count: tokens * (0.6 if (tokens >= num_tokens) == (count == 2) else 1.0)


def drive(tuner: MicrobatchTuner, num_tokens: int, cost: Cost, num_steps: int) -> list[int]:
    """The choices of so many steps."""
    choices = []
    for _ in range(num_steps):
        count = tuner.choose(num_tokens=num_tokens, num_seqs=num_tokens)
        tuner.record(num_tokens=num_tokens, count=count, duration_s=cost(num_tokens, count))
        choices.append(count)
    return choices


def test_both_are_tried_and_then_the_faster_one_is_used() -> None:
    tuner, cost = MicrobatchTuner(), overlap_pays_from(16)
    first = drive(tuner, 32, cost, 2 * NUM_TRIALS)
    assert Counter(first) == {1: NUM_TRIALS, 2: NUM_TRIALS}
    assert set(drive(tuner, 32, cost, 20)) == {2}


def test_sizes_are_judged_apart() -> None:
    tuner, cost = MicrobatchTuner(), overlap_pays_from(16)
    for num_tokens in (8, 64):
        drive(tuner, num_tokens, cost, 2 * NUM_TRIALS)
    assert set(drive(tuner, 8, cost, 20)) == {1}
    assert set(drive(tuner, 64, cost, 20)) == {2}


def test_the_slower_one_is_tried_again_and_taken_when_it_has_become_faster() -> None:
    tuner = MicrobatchTuner()
    drive(tuner, 32, overlap_pays_from(16), 20)
    after = drive(tuner, 32, overlap_pays_from(1000), 8 * RETRY_INTERVAL)
    assert after[0] == 2
    assert set(after[-20:]) == {1}


def test_what_cannot_be_cut_is_not_cut() -> None:
    tuner = MicrobatchTuner()
    assert {tuner.choose(num_tokens=2, num_seqs=2) for _ in range(9)} == {1}
    assert {tuner.choose(num_tokens=300, num_seqs=1) for _ in range(9)} == {1}
