"""Workloads: lengths, reproducibility, disjoint streams, dataset files."""

from __future__ import annotations

import itertools
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xdeepserve.errors import ConfigError
from xdeepserve.loadgen.workload import (
    DatasetRow,
    LengthDistribution,
    Workload,
    WorkloadConfig,
    WorkloadRequest,
    read_dataset,
)


def take(config: WorkloadConfig, count: int, stream: int = 0) -> list[WorkloadRequest]:
    return list(itertools.islice(Workload(config, "m").requests(stream=stream), count))


def prompts(config: WorkloadConfig, count: int, stream: int = 0) -> list[Any]:
    return [request.body["prompt"] for request in take(config, count, stream)]


def draws(spec: str, count: int = 4000) -> list[int]:
    rng = random.Random(1)
    distribution = LengthDistribution.parse(spec)
    return [distribution.draw(rng) for _ in range(count)]


def test_fixed_length_is_that_length() -> None:
    assert set(draws("37", 10)) == {37}


def test_uniform_covers_its_range_and_nothing_else() -> None:
    assert set(draws("uniform:3:9")) == set(range(3, 10))


def test_lognormal_mean_is_in_tokens() -> None:
    assert statistics.fmean(draws("lognormal:200:0.5")) == pytest.approx(200, rel=0.05)


def test_lognormal_is_never_below_one() -> None:
    assert min(draws("lognormal:1:2")) == 1


@pytest.mark.parametrize("spec", ["128", "uniform:64:256", "lognormal:200:0.5"])
def test_length_prints_as_it_is_written(spec: str) -> None:
    assert str(LengthDistribution.parse(spec)) == spec


@pytest.mark.parametrize(
    "spec",
    [
        *("", "0", "-1", "1.5", "x", "nan", "inf", "1e12"),
        *("uniform:5", "uniform:9:3", "uniform:0:3", "uniform:1:2:3"),
        *("lognormal:0:1", "lognormal:10:-1", "lognormal:10:nan", "zipf:1:2"),
    ],
)
def test_bad_length_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="length"):
        LengthDistribution.parse(spec)


def test_prompts_have_the_asked_lengths_and_ids() -> None:
    config = WorkloadConfig(
        input_len=LengthDistribution("uniform", 5, 9), token_range=(100, 110), seed=3
    )
    for request in take(config, 50):
        prompt = request.body["prompt"]
        assert len(prompt) == request.input_len
        assert 5 <= len(prompt) <= 9
        assert all(100 <= token_id < 110 for token_id in prompt)


def test_request_asks_for_exactly_the_output_length() -> None:
    config = WorkloadConfig(output_len=LengthDistribution("fixed", 17))
    (request,) = take(config, 1)
    assert request.path == "/v1/completions"
    assert request.output_len == 17
    assert request.body["max_tokens"] == 17
    assert request.body["ignore_eos"] is True
    assert request.body["stream_options"] == {"include_usage": True}


def test_same_seed_same_prompts_other_seed_others() -> None:
    config = WorkloadConfig(seed=5)
    assert prompts(config, 4) == prompts(config, 4)
    assert prompts(config, 4) != prompts(replace(config, seed=6), 4)


def test_streams_share_only_the_prefix() -> None:
    config = WorkloadConfig(shared_prefix_len=20, seed=5)
    first, second = prompts(config, 8), prompts(config, 8, stream=1)
    every = first + second
    assert len({tuple(prompt[:20]) for prompt in every}) == 1
    assert len({tuple(prompt[20:24]) for prompt in every}) == 16


def test_prefix_leaves_at_least_one_own_token() -> None:
    config = WorkloadConfig(input_len=LengthDistribution("fixed", 4), shared_prefix_len=100)
    first, second = prompts(config, 2)
    assert (len(first), first[:3]) == (4, second[:3])


def test_chat_prompt_has_one_word_per_token() -> None:
    config = WorkloadConfig(endpoint="chat", input_len=LengthDistribution("fixed", 12))
    (request,) = take(config, 1)
    assert request.path == "/v1/chat/completions"
    assert len(request.body["messages"][0]["content"].split()) == 12


def test_extra_body_wins_and_ignore_eos_can_be_left_out() -> None:
    config = WorkloadConfig(extra_body={"temperature": 1, "min_p": 0.1}, ignore_eos=False)
    (request,) = take(config, 1)
    assert (request.body["temperature"], request.body["min_p"]) == (1, 0.1)
    assert "ignore_eos" not in request.body


@pytest.mark.parametrize("token_range", [(5, 5), (-1, 5), (9, 3)])
def test_bad_token_range_is_refused(token_range: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="token range"):
        WorkloadConfig(token_range=token_range)


def write(folder: Path, text: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(text)
    return path


def test_dataset_rows_are_used_in_turn(tmp_path: Path) -> None:
    rows = read_dataset(
        write(
            tmp_path,
            '{"input_len": 3, "output_len": 4}\n\n{"prompt": [7, 8], "output_len": 5}\n'
            '{"prompt": "hello", "output_len": 6}\n',
        )
    )
    requests = take(WorkloadConfig(dataset=tuple(rows)), 4)
    assert [request.output_len for request in requests] == [4, 5, 6, 4]
    assert [request.input_len for request in requests] == [3, 2, None, 3]
    assert requests[1].body["prompt"] == [7, 8]
    assert requests[2].body["prompt"] == "hello"
    assert requests[0].body["prompt"] != requests[3].body["prompt"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no rows"),
        ('{"output_len": 3}\n', "line 1: needs"),
        ('{"input_len": 1, "output_len": 3}\n{"input_len": 0, "output_len": 3}', "line 2: lengths"),
        ('{"input_len": 3, "output_len": -1}', "line 1: lengths"),
        ('{"input_len": 3}', "line 1: Object missing"),
        ('{"input_len": 3, "output_len": 1, "x": 2}', "line 1: .*unknown field"),
        ("{", "line 1: "),
    ],
)
def test_bad_dataset_is_refused_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_dataset(write(tmp_path, text))


def test_missing_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset"):
        read_dataset(tmp_path / "absent")


def test_token_id_prompt_on_chat_is_refused() -> None:
    row = DatasetRow(output_len=1, prompt=[1, 2])
    with pytest.raises(ConfigError, match="token ids"):
        take(WorkloadConfig(endpoint="chat", dataset=(row,)), 1)
