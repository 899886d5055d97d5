"""What each sampling parameter does to the choice, and that rows do not touch each other."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from xdeepserve.messages import SamplingParams
from xdeepserve.models.sampler import HeadOrder, Sampler, SampleRow
from xdeepserve.ops import F32, get_ops

EOS = 9
LOGITS = np.array([1.0, 4.0, 3.0, -2.0, 0.5, 2.0, 0.0, -1.0, 1.5, 5.0], np.float32)


@pytest.fixture(params=["reference", "cpu"])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    return Sampler(get_ops(request.param), eos_token_ids=(EOS,))


def row(
    prompt: list[int] | None = None, output: list[int] | None = None, **params: Any
) -> SampleRow:
    values = {"max_tokens": 50, "temperature": 0.0} | params
    prompt, output = prompt or [0], output or []
    token_ids = array("i", prompt + output)
    return SampleRow(SamplingParams(**values), token_ids, len(prompt), len(token_ids))


def choose(sampler: Sampler, *rows: SampleRow, logits: F32 = LOGITS) -> list[int]:
    return sampler.sample(np.stack([logits] * len(rows)), rows).token_ids


def test_greedy_takes_the_largest_logit(sampler: Sampler) -> None:
    assert choose(sampler, row(), row(temperature=1e-6)) == [9, 9]


def test_min_tokens_masks_every_id_that_would_end_the_sequence(sampler: Sampler) -> None:
    assert choose(sampler, row(min_tokens=1)) == [1]
    assert choose(sampler, row(min_tokens=1, stop_token_ids=(1,))) == [2]
    assert choose(sampler, row(output=[4], min_tokens=1)) == [9]
    assert choose(sampler, row(min_tokens=1, ignore_eos=True)) == [9]


def test_logit_bias(sampler: Sampler) -> None:
    assert choose(sampler, row(logit_bias={3: 7.5})) == [3]
    assert choose(sampler, row(logit_bias={9: -100.0, 1: -0.5, 2: 0.6})) == [2]
    assert choose(sampler, row(logit_bias={9: 100.0}, min_tokens=1)) == [1]


def test_presence_penalty_counts_output_tokens_once(sampler: Sampler) -> None:
    assert choose(sampler, row(output=[9, 9, 9], presence_penalty=0.9)) == [9]
    assert choose(sampler, row(output=[9], presence_penalty=1.5)) == [1]
    assert choose(sampler, row(prompt=[9], presence_penalty=1.5)) == [9]


def test_frequency_penalty_counts_every_occurrence(sampler: Sampler) -> None:
    assert choose(sampler, row(output=[9], frequency_penalty=0.9)) == [9]
    assert choose(sampler, row(output=[9, 9], frequency_penalty=0.9)) == [1]
    assert choose(sampler, row(output=[7, 7], frequency_penalty=-2.0)) == [9]
    assert choose(sampler, row(output=[7] * 4, frequency_penalty=-2.0)) == [7]


def test_repetition_penalty_covers_prompt_and_output(sampler: Sampler) -> None:
    assert choose(sampler, row(prompt=[9, 9], repetition_penalty=2.0)) == [1]
    assert choose(sampler, row(prompt=[9], output=[1], repetition_penalty=2.0)) == [2]


def test_repetition_penalty_pushes_negative_logits_down(sampler: Sampler) -> None:
    negative = -1.0 - LOGITS[::-1].copy() ** 2
    best = int(negative.argmax())
    other = int(np.argsort(-negative)[1])
    assert choose(sampler, row(prompt=[best], repetition_penalty=2.0), logits=negative) == [other]


def test_logits_are_as_before_afterwards(sampler: Sampler) -> None:
    logits = np.stack([LOGITS, LOGITS])
    rows = [row(min_tokens=1, logit_bias={2: 3.0}), row(output=[2, 2], repetition_penalty=3.0)]
    sampler.sample(logits, rows)
    np.testing.assert_array_equal(logits, np.stack([LOGITS, LOGITS]))


def test_logprobs_are_of_the_raw_distribution(sampler: Sampler) -> None:
    rows = [
        row(logprobs=3, logit_bias={9: -100.0}),
        row(),
        row(logprobs=0),
        row(logprobs=1, temperature=5.0, seed=3),
    ]
    result = sampler.sample(np.stack([LOGITS] * 4), rows)
    exact = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    first, second, third, fourth = result.logprobs
    assert second is None
    assert first is not None
    assert third is not None
    assert fourth is not None
    assert result.token_ids[:3] == [1, 9, 9]
    assert first.logprob == pytest.approx(exact[1], abs=1e-5)
    assert first.top_ids == [9, 1, 2]
    assert first.top_logprobs == pytest.approx(exact[[9, 1, 2]], abs=1e-5)
    assert (third.top_ids, third.top_logprobs) == ([], [])
    assert third.logprob == pytest.approx(exact[9], abs=1e-5)
    assert fourth.logprob == pytest.approx(exact[result.token_ids[3]], abs=1e-5)


def test_a_row_is_the_same_in_every_company(sampler: Sampler) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (12, 300)).astype(np.float32)
    rows = [
        row(
            prompt=[int(i) for i in rng.integers(0, 300, 20)],
            output=[int(i) for i in rng.integers(0, 300, n)],
            temperature=0.2 * n,
            seed=n * 7919,
            top_k=n % 4 * 10,
            top_p=1.0 - 0.05 * (n % 3),
            min_p=0.01 * (n % 2),
            repetition_penalty=1.0 + 0.1 * (n % 2),
            presence_penalty=0.1 * (n % 3),
            logprobs=n if n % 2 else None,
        )
        for n in range(12)
    ]
    together = sampler.sample(logits, rows)
    for idx in range(12):
        alone = sampler.sample(logits[idx : idx + 1], [rows[idx]])
        assert alone.token_ids == [together.token_ids[idx]]
        assert alone.logprobs == [together.logprobs[idx]]


def test_rows_that_the_head_has_chosen_stay_in_their_places(sampler: Sampler) -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 2, (9, 300)).astype(np.float32)
    rows = [
        row(),
        row(temperature=0.9, seed=1),
        row(logprobs=2),
        row(),
        row(output=[3, 4], presence_penalty=0.5),
        row(logit_bias={7: 50.0}),
        row(),
        row(output=[2], min_tokens=1),
        row(min_tokens=2),
    ]
    for chosen in (rows, [row()] * 9, [row(temperature=1.0, seed=n) for n in range(9)]):
        order = HeadOrder.of(chosen)
        assert order.num_greedy == sum(r == row() or r == rows[7] for r in chosen)
        in_order = order.arrange(logits)
        greedy_ids = in_order[: order.num_greedy].argmax(axis=1).astype(np.int32)
        result = sampler.complete(order, greedy_ids, in_order[order.num_greedy :], chosen)
        assert result == sampler.sample(logits, chosen)


def test_seed_and_position_choose_the_random_number(sampler: Sampler) -> None:
    flat = np.zeros(10, np.float32)
    first = row(temperature=1.0, seed=1)
    later = [first._replace(position=position) for position in range(200)]
    tokens = choose(sampler, *later, logits=flat)
    assert tokens == choose(sampler, *later, logits=flat)
    assert set(tokens) == set(range(10))
    second = row(temperature=1.0, seed=2)
    other = [second._replace(position=position) for position in range(200)]
    assert choose(sampler, *other, logits=flat) != tokens


def test_frequencies_follow_the_probabilities(sampler: Sampler) -> None:
    first = row(temperature=1.0, seed=11)
    rows = [first._replace(position=position) for position in range(4000)]
    counts = np.bincount(choose(sampler, *rows), minlength=10) / 4000
    exact = np.exp(LOGITS) / np.exp(LOGITS).sum()
    np.testing.assert_allclose(counts, exact, atol=0.03)
