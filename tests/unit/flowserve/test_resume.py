"""Resuming: an engine that is given the first k output tokens makes exactly the rest."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from tests import law1_harness as law1
from tests.toys import toy_model
from tests.unit.flowserve.builders import Harness, make_request
from xdeepserve.errors import RequestError
from xdeepserve.flowserve.build import build_dp_group
from xdeepserve.flowserve.dp_group import DPGroup
from xdeepserve.flowserve.validation import validate_request
from xdeepserve.messages import FinishReason, GenerateRequest, SamplingParams
from xdeepserve.testing.fake_clock import FakeClock
from xdeepserve.testing.scripted_engine import DEFAULT_INFO
from xdeepserve.testing.scripted_executor import scripted_output

MAX_TOKENS = 12


def make_group(toy: str) -> DPGroup:
    return build_dp_group(
        model=toy_model(toy, "bf16", "cpu"),
        model_name="toy",
        config=law1.config(),
        clock=FakeClock(),
    )


def mixed(toy: str) -> list[GenerateRequest]:
    """Every way of sampling, min_tokens, penalties and logprobs among them."""
    vocab_size = toy_model(toy, "bf16", "cpu").spec.vocab_size
    requests = law1.mixed_requests(vocab_size, 8, max_tokens=MAX_TOKENS)
    strong = {"presence_penalty": 1.5, "frequency_penalty": 0.8, "repetition_penalty": 1.4}
    params = [msgspec.structs.replace(item.params, **strong) for item in requests[:2]]
    requests += [
        law1.request(f"penalized{i}", requests[i].prompt_token_ids, **msgspec.structs.asdict(p))
        for i, p in enumerate(params)
    ]
    return requests


def resumed(request: GenerateRequest, token_ids: Sequence[int], count: int) -> GenerateRequest:
    return msgspec.structs.replace(
        request,
        request_id=f"{request.request_id}+{count}",
        resume_token_ids=list(token_ids[:count]),
    )


@pytest.mark.parametrize("toy", ["glm4_moe", "deepseek_v3"])
def test_resumed_equals_undisturbed_after_any_token(toy: str) -> None:
    requests = mixed(toy)
    whole = law1.generate(make_group(toy), requests)
    for count in (1, 2, 5, 8, MAX_TOKENS - 1):
        continued = [
            resumed(item, whole[item.request_id].token_ids, count)
            for item in requests
            if len(whole[item.request_id].token_ids) > count
        ]
        rest = law1.generate(make_group(toy), continued)
        for item in continued:
            expected = whole[item.request_id.split("+")[0]]
            got = rest[item.request_id]
            assert got.token_ids == expected.token_ids[count:], item.request_id
            assert got.logprobs == expected.logprobs[count:], item.request_id
            assert got.finish_reason is expected.finish_reason
            assert got.usage == expected.usage, "the bill is that of one undisturbed run"


def test_resume_twice() -> None:
    request = mixed("glm4_moe")[2]
    whole = law1.generate(make_group("glm4_moe"), [request])[request.request_id]
    for count in (3, 4):
        item = resumed(request, whole.token_ids, count)
        rest = law1.generate(make_group("glm4_moe"), [item])[item.request_id]
        assert rest.token_ids == whole.token_ids[count:]


def test_cached_tokens_of_a_resumed_request_never_exceed_its_prompt() -> None:
    harness = Harness()
    prompt = [5, 6, 7]
    harness.add(make_request("a", prompt, max_tokens=20))
    harness.run()
    output = scripted_output(prompt, 20)
    item = msgspec.structs.replace(
        make_request("b", prompt, max_tokens=20), resume_token_ids=output[:15]
    )
    harness.add(item)
    harness.run()
    usage = harness.last("b").usage
    assert (usage.num_prompt_tokens, usage.num_cached_tokens) == (3, 3)
    assert usage.num_output_tokens == 20
    assert harness.tokens("b") == output[15:]
    assert harness.scheduler.load_report().num_generated_tokens == 25


def test_limits_count_resumed_tokens_as_output() -> None:
    output = scripted_output([5, 6, 7], 20)
    harness = Harness(max_model_len=12)
    params = {"max_tokens": 20, "stop_token_ids": (output[6],), "min_tokens": 8}
    item = msgspec.structs.replace(make_request("a", **params), resume_token_ids=output[:5])
    harness.add(item)
    harness.run()
    assert harness.last("a").finish_reason is FinishReason.LENGTH
    assert harness.tokens("a") == output[5:9], "min_tokens=8 masks the stop at 7; 12 is the limit"


def test_waiting_requests_reserve_blocks_for_prompt_and_resumed_tokens() -> None:
    harness = Harness(max_num_seqs=1, num_kv_blocks=32)
    first = make_request("a", range(5, 10))
    second = msgspec.structs.replace(
        make_request("b", range(5, 15), max_tokens=9), resume_token_ids=[9, 9, 9]
    )
    harness.add(first, second)
    assert harness.scheduler.load_report().num_reserved_blocks == 2 + 4
    harness.step()
    load = harness.scheduler.load_report()
    assert load.num_reserved_blocks == 4
    assert load.kv_demand == (2 + 4) / 32
    harness.run()
    assert harness.scheduler.load_report().kv_demand == 0


@pytest.mark.parametrize(
    ("resume", "message"),
    [([7] * 4, "4 output tokens"), ([-1], "token id -1"), ([7] * 3 + [999], "token id 999")],
)
def test_what_cannot_be_resumed_is_refused(resume: list[int], message: str) -> None:
    max_tokens = 4 if 999 not in resume else 9
    request = GenerateRequest(
        request_id="a",
        prompt_token_ids=[5],
        params=SamplingParams(max_tokens=max_tokens),
        resume_token_ids=resume,
    )
    with pytest.raises(RequestError, match=message):
        validate_request(request, DEFAULT_INFO)
