"""Drafts in the scheduler: budget, blocks, ends, counters - and output that does not change."""

from __future__ import annotations

from array import array
from dataclasses import replace
from itertools import pairwise

from tests.unit.flowserve.builders import EOS, Harness, ScriptProposer, make_request
from xdeepserve.flowserve.draft_price import NUM_TRIALS
from xdeepserve.flowserve.step import ScheduledRequest
from xdeepserve.messages import FinishReason
from xdeepserve.testing.scripted_executor import scripted_output

PROMPT = (5, 6, 7)


def started(harness: Harness) -> Harness:
    """One request past the steps that measure plain decoding."""
    harness.add(make_request("a", PROMPT, max_tokens=40, logprobs=0))
    for _ in range(1 + NUM_TRIALS):
        harness.step()
    return harness


def test_accepted_drafts_come_out_in_one_step_with_their_logprobs() -> None:
    harness = started(Harness(proposer=ScriptProposer()))
    (output,) = harness.step()
    assert len(output.token_ids) == 5
    assert output.logprobs is not None
    assert len(output.logprobs) == 5
    assert harness.tokens("a") == scripted_output(PROMPT, 5 + 1 + NUM_TRIALS)


def test_wrong_drafts_are_dropped_and_counted_by_position() -> None:
    harness = started(Harness(proposer=ScriptProposer(wrong_every=3)))
    harness.step()
    load = harness.scheduler.load_report()
    assert (load.num_drafts, load.num_draft_tokens, load.num_accepted_tokens) == (1, 4, 2)
    assert load.accepted_per_position == (1, 1, 0, 0)
    harness.run()
    assert harness.tokens("a") == scripted_output(PROMPT, 40)


def test_output_is_that_of_plain_decoding_whatever_ends_it() -> None:
    for params in (
        {"max_tokens": 1},
        {"max_tokens": 6},
        {"max_tokens": 23},
        {"max_tokens": 60},  # cut by max_model_len
        {"max_tokens": 30, "stop_token_ids": (scripted_output(PROMPT, 11)[-1],)},
    ):
        plain, drafting = Harness(), Harness(proposer=ScriptProposer(wrong_every=7))
        for harness in (plain, drafting):
            harness.add(make_request("a", PROMPT, **params))
            harness.run()
        assert drafting.tokens("a") == plain.tokens("a")
        ends = [h.last("a") for h in (plain, drafting)]
        assert ends[0].finish_reason == ends[1].finish_reason
        assert ends[0].stop_token_id == ends[1].stop_token_id
        assert ends[0].usage == ends[1].usage


def test_an_end_among_accepted_drafts_cuts_what_follows() -> None:
    def script(item: ScheduledRequest) -> int:
        return EOS if len(item.token_ids) == len(PROMPT) + NUM_TRIALS + 3 else 8

    class Eights:
        def propose(self, token_ids: array[int], *, limit: int) -> tuple[int, ...]:
            return (8, 8, EOS, 8)[:limit]

    harness = started(Harness(script=script, proposer=Eights()))
    (output,) = harness.step()
    assert output.token_ids == [8, 8, EOS]
    assert output.finish_reason is FinishReason.STOP
    assert harness.scheduler.load_report().num_free_blocks == harness.config.num_kv_blocks


def test_drafts_take_only_what_is_left_of_the_budget() -> None:
    harness = Harness(max_num_seqs=4, max_num_batched_tokens=6, proposer=ScriptProposer())
    for name in "abcd":
        harness.add(make_request(name, PROMPT, max_tokens=30))
    harness.run()
    assert max(sum(share.values()) for share in harness.shares) == 6
    for name in "abcd":
        assert harness.tokens(name) == scripted_output(PROMPT, 30)


def test_a_step_that_prefills_takes_no_drafts() -> None:
    harness = started(Harness(proposer=ScriptProposer()))
    harness.add(make_request("b", range(10, 20), max_tokens=1))
    harness.step()
    assert harness.shares[-1] == {"a": 1, "b": 10}


def test_drafts_never_preempt() -> None:
    plain, drafting = (
        Harness(num_kv_blocks=6, max_model_len=24, proposer=proposer)
        for proposer in (None, ScriptProposer(wrong_every=5))
    )
    for harness in (plain, drafting):
        for name in "ab":
            harness.add(make_request(name, PROMPT, max_tokens=8))
        harness.run()
    assert plain.scheduler.load_report().num_preemptions == 0
    assert drafting.scheduler.load_report().num_preemptions == 0
    assert drafting.scheduler.load_report().num_accepted_tokens > 0


def test_only_confirmed_tokens_are_published() -> None:
    """A second turn over the answer hits the cache, whose KV the executor checks id by id."""
    harness = started(Harness(proposer=ScriptProposer(wrong_every=3)))
    harness.run()
    answer = harness.tokens("a")
    harness.add(make_request("turn", [*PROMPT, *answer, 9], max_tokens=1))
    harness.run()
    assert harness.last("turn").usage.num_cached_tokens == 40
    assert all(a != b for a, b in pairwise(answer))


def test_what_the_model_drafts_is_checked_in_the_next_step() -> None:
    harness = started(Harness(speculation="mtp"))
    (output,) = harness.step()
    assert len(output.token_ids) == 5
    harness.run()
    assert harness.tokens("a") == scripted_output(PROMPT, 40)
    load = harness.scheduler.load_report()
    assert load.num_accepted_tokens == load.num_draft_tokens > 0


def test_drafts_that_the_model_made_outlive_a_preemption() -> None:
    harness = Harness(speculation="mtp", num_kv_blocks=8, max_model_len=32)
    for name in "abc":
        harness.add(make_request(name, PROMPT, max_tokens=26))
    harness.run()
    load = harness.scheduler.load_report()
    assert load.num_preemptions > 0
    assert load.num_accepted_tokens == load.num_draft_tokens > 0
    for name in "abc":
        assert harness.tokens(name) == scripted_output(PROMPT, 26)


def test_a_model_whose_drafts_do_not_pay_is_not_asked_for_them() -> None:
    harness = started(Harness(speculation="mtp"))
    plans = []
    for _ in range(12):
        plan = harness.scheduler.schedule()
        plans.append(plan)
        result = harness.executor.execute(plan=plan)
        wrong = tuple((120,) * len(drafts) for drafts in result.draft_token_ids)
        harness.scheduler.update(plan, replace(result, draft_token_ids=wrong))
        # a draft costs as much as a token
        harness.scheduler.record_duration(plan, result, 1.0 + plan.num_drafts)
    assert plans[0].scheduled[0].num_drafts_wanted == 4
    assert plans[-1].scheduled[0].num_drafts_wanted == 0
    assert plans[-1].num_drafts == 0
