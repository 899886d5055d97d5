"""Scheduler: budgets, order of service, preemption, abort, and how requests end."""

from __future__ import annotations

import pytest

from tests.unit.flowserve.builders import EOS, Harness, make_config, make_request, make_scheduler
from xdeepserve.errors import ConfigError, IntegrityError, RequestError
from xdeepserve.flowserve.step import StepResult
from xdeepserve.messages import FinishReason, TokenOutput
from xdeepserve.testing.scripted_executor import scripted_output


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    harness = Harness()
    prompt = list(range(10, 50))
    harness.add(make_request("a", prompt, max_tokens=2))
    harness.run()
    assert [share["a"] for share in harness.shares] == [16, 16, 8, 1]
    assert harness.tokens("a") == scripted_output(prompt, 2)


def test_a_long_prompt_never_stalls_decoding() -> None:
    harness = Harness()
    harness.add(make_request("long", range(10, 60), max_tokens=2))
    harness.add(make_request("short", [5], max_tokens=8))
    harness.step()
    assert harness.shares[-1] == {"long": 16}
    harness.add(make_request("late", [6], max_tokens=8))
    harness.run()
    served = [share for share in harness.shares if "short" in share]
    assert len(served) == 8
    assert [share["short"] for share in served] == [1] * 8
    for share in harness.shares:
        assert sum(share.values()) <= 16


def test_decoding_goes_on_beside_a_prefill_that_was_there_first() -> None:
    harness = Harness(max_num_batched_tokens=8)
    harness.add(make_request("decoding", [5], max_tokens=20))
    harness.step()
    harness.add(make_request("first", range(10, 40), max_tokens=1, priority=-1))
    harness.step()
    assert harness.shares[-1] == {"decoding": 1, "first": 7}
    harness.step()
    assert harness.shares[-1] == {"decoding": 1, "first": 7}


def test_waiting_requests_start_by_priority_then_arrival() -> None:
    harness = Harness(max_num_seqs=1)
    for request_id, priority in (("c", 5), ("a", 0), ("d", 5), ("b", 0)):
        harness.add(make_request(request_id, priority=priority, max_tokens=1))
    harness.run()
    assert [next(iter(share)) for share in harness.shares] == ["a", "b", "c", "d"]


def test_no_more_than_max_num_seqs_run() -> None:
    harness = Harness(max_num_seqs=3)
    for idx in range(7):
        harness.add(make_request(f"r{idx}", max_tokens=3))
    harness.run()
    assert max(len(share) for share in harness.shares) == 3
    assert len(harness.outputs) == 7


def test_the_latest_request_is_preempted_and_ends_as_if_undisturbed() -> None:
    harness = Harness(num_kv_blocks=8, max_model_len=32)
    prompts = {"a": [5, 6, 7], "b": [8, 9, 10]}
    for request_id, prompt in prompts.items():
        harness.add(make_request(request_id, prompt, max_tokens=20))
    harness.run()
    report = harness.scheduler.load_report()
    assert report.num_preemptions >= 1
    assert report.num_free_blocks == report.num_total_blocks
    for request_id, prompt in prompts.items():
        assert harness.tokens(request_id) == scripted_output(prompt, 20)
    assert [share.get("a") for share in harness.shares[:20]].count(None) == 0


def test_the_least_urgent_request_is_preempted_whatever_its_arrival() -> None:
    harness = Harness(num_kv_blocks=8, max_model_len=32)
    harness.add(make_request("low", max_tokens=20, priority=9))
    harness.step()
    harness.add(make_request("high", max_tokens=20, priority=0))
    harness.run()
    finished = [i for i, share in enumerate(harness.shares) if "high" in share]
    assert len(finished) == 20
    assert harness.scheduler.load_report().num_preemptions >= 1


def test_usage_counts_the_first_hit_and_not_the_recomputation() -> None:
    harness = Harness(num_kv_blocks=8, max_model_len=32)
    harness.add(make_request("warm", range(10, 19), max_tokens=1))
    harness.run()
    harness.add(make_request("hit", range(10, 19), max_tokens=12))
    harness.add(make_request("victim", range(20, 23), max_tokens=20))
    harness.run()
    assert harness.scheduler.load_report().num_preemptions >= 1
    hit, victim = harness.last("hit").usage, harness.last("victim").usage
    assert (hit.num_prompt_tokens, hit.num_cached_tokens, hit.num_output_tokens) == (9, 8, 12)
    assert (victim.num_cached_tokens, victim.num_output_tokens) == (0, 20)


def test_counters_tell_what_the_prefix_cache_served() -> None:
    harness = Harness()
    for request_id in ("a", "b"):
        harness.add(make_request(request_id, range(10, 19), max_tokens=2))
        harness.run()
    report = harness.scheduler.load_report()
    assert (report.prefix_cache_queries, report.prefix_cache_hits) == (18, 8)
    assert (report.num_prompt_tokens, report.num_generated_tokens) == (18, 4)


def test_tenants_share_nothing() -> None:
    harness = Harness()
    for request_id, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        harness.add(make_request(request_id, range(10, 19), cache_salt=salt, max_tokens=1))
        harness.run()
    cached = {i: harness.last(i).usage.num_cached_tokens for i in "abc"}
    assert cached == {"a": 0, "b": 0, "c": 8}


@pytest.mark.parametrize("when", ["waiting", "running", "between", "preempted", "prefilling"])
def test_abort_at_any_moment_frees_everything_at_once(when: str) -> None:
    harness = Harness(num_kv_blocks=8, max_model_len=32, max_num_batched_tokens=8)
    prompt = range(10, 30) if when == "prefilling" else range(10, 13)
    if when == "preempted":
        harness.add(make_request("other", max_tokens=20))
    harness.add(make_request("x", prompt, max_tokens=20))
    if when == "preempted":
        while harness.scheduler.load_report().num_preemptions == 0:
            harness.step()
    elif when != "waiting":
        harness.step()
    if when == "between":
        outputs = harness.step(abort_between=["x"])
        assert [o.request_id for o in outputs] == ["x"]
    else:
        ended = harness.scheduler.abort("x")
        assert ended is not None
        harness.record([ended])
    harness.scheduler.check_integrity()
    last = harness.last("x")
    assert last.finish_reason is FinishReason.ABORT
    assert last.token_ids == []
    assert last.usage.num_output_tokens == len(harness.tokens("x"))
    assert harness.scheduler.abort("x") is None
    if when != "preempted":
        assert harness.scheduler.load_report().num_free_blocks == 8
    harness.run()


def test_an_id_may_be_used_again_after_its_end_only() -> None:
    harness = Harness()
    harness.add(make_request("a"))
    with pytest.raises(RequestError, match="already in use"):
        harness.add(make_request("a"))
    harness.run()
    harness.outputs.clear()
    harness.add(make_request("a"))
    harness.run()
    assert len(harness.tokens("a")) == 4


def ending(script: list[int], **params: object) -> TokenOutput:
    """The terminal output of a request whose executor answers with `script`."""
    answers = iter(script)
    harness = Harness(script=lambda item: next(answers), max_model_len=10)
    harness.add(make_request("a", [5, 6, 7], **params))
    harness.run()
    last = harness.last("a")
    assert last.usage.num_output_tokens == len(harness.tokens("a"))
    return last


def test_eos_ends_with_stop_and_names_the_id() -> None:
    last = ending([9, EOS], max_tokens=5)
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, EOS)
    assert last.token_ids == [EOS]


def test_ignore_eos_goes_on_but_stop_ids_still_end() -> None:
    last = ending([EOS, 9], max_tokens=5, ignore_eos=True, stop_token_ids=(9,))
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, 9)


def test_stop_ids_count_only_once_min_tokens_exist() -> None:
    last = ending([9, EOS, 9], max_tokens=5, min_tokens=2, stop_token_ids=(9,))
    assert last.finish_reason is FinishReason.STOP
    assert last.usage.num_output_tokens == 3


def test_stop_wins_over_length_on_the_last_token() -> None:
    last = ending([8, EOS], max_tokens=2)
    assert last.finish_reason is FinishReason.STOP


def test_max_tokens_and_max_model_len_end_with_length() -> None:
    assert ending([8, 8], max_tokens=2).finish_reason is FinishReason.LENGTH
    last = ending([8] * 7, max_tokens=50)
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage.num_output_tokens == 7
    assert last.stop_token_id is None


def test_a_result_without_a_token_where_one_is_due_is_an_integrity_error() -> None:
    scheduler = make_scheduler(make_config())
    scheduler.add(make_request("a"))
    plan = scheduler.schedule()
    with pytest.raises(IntegrityError, match="0 ids"):
        scheduler.update(plan, StepResult(token_ids=((),), logprobs=(None,)))


def test_more_ids_than_drafts_allow_are_an_integrity_error() -> None:
    scheduler = make_scheduler(make_config())
    scheduler.add(make_request("a"))
    plan = scheduler.schedule()
    with pytest.raises(IntegrityError, match="2 ids, samples=True, 0 drafts"):
        scheduler.update(plan, StepResult(token_ids=((8, 8),), logprobs=(None,)))


def test_a_pool_that_cannot_hold_one_longest_request_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_model_len=65 exceeds the KV cache's 64 tokens"):
        make_scheduler(make_config(num_kv_blocks=16), max_model_len=65)


def test_a_request_as_long_as_the_pool_runs_alone() -> None:
    harness = Harness(num_kv_blocks=8, max_model_len=32)
    harness.add(make_request("other", max_tokens=20))
    harness.add(make_request("big", range(10, 38), max_tokens=9))
    harness.run()
    assert harness.last("big").finish_reason is FinishReason.LENGTH
    assert harness.last("big").usage.num_output_tokens == 4


def test_fail_all_answers_every_request_once() -> None:
    harness = Harness(max_num_seqs=1)
    harness.add(make_request("a", max_tokens=9), make_request("b"))
    harness.step()
    outputs = harness.scheduler.fail_all("boom")
    assert {o.request_id for o in outputs} == {"a", "b"}
    assert {o.finish_reason for o in outputs} == {FinishReason.ERROR}
    assert {o.error for o in outputs} == {"boom"}
    assert not harness.scheduler.has_requests


def test_an_update_that_fails_halfway_leaves_every_request_to_be_answered() -> None:
    scheduler = make_scheduler(make_config())
    for request_id in "ab":
        scheduler.add(make_request(request_id, max_tokens=1))
    plan = scheduler.schedule()
    with pytest.raises(IntegrityError):
        scheduler.update(plan, StepResult(token_ids=((8,), ()), logprobs=(None, None)))
    assert {o.request_id for o in scheduler.fail_all("boom")} == {"a", "b"}
