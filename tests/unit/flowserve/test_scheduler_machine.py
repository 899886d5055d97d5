"""Random adds, aborts and steps: the scheduler's laws hold after each, with drafts and without."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.flowserve.builders import Harness, ScriptProposer, make_request
from xdeepserve.flowserve.speculator import Proposer
from xdeepserve.messages import FinishReason, GenerateRequest
from xdeepserve.testing.scripted_executor import scripted_output

NUM_BLOCKS = 12
MAX_MODEL_LEN = 40

prompts = st.lists(st.integers(3, 5), min_size=1, max_size=30)


class SchedulerMachine(RuleBasedStateMachine):
    """Small pool, small budgets, few distinct tokens: hits and preemptions are frequent."""

    def __init__(self) -> None:
        super().__init__()
        self.harness = Harness(
            max_num_seqs=4,
            max_num_batched_tokens=9,
            num_kv_blocks=NUM_BLOCKS,
            max_model_len=MAX_MODEL_LEN,
            proposer=self.make_proposer(),
        )
        self.requests: dict[str, GenerateRequest] = {}

    def make_proposer(self) -> Proposer | None:
        return None

    def live(self) -> list[str]:
        outputs = self.harness.outputs
        return [
            i for i in self.requests if i not in outputs or outputs[i][-1].finish_reason is None
        ]

    @rule(
        prompt=prompts,
        max_tokens=st.integers(1, 30),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "t"]),
    )
    def add(self, prompt: list[int], max_tokens: int, priority: int, salt: str) -> None:
        request = make_request(
            f"r{len(self.requests)}",
            prompt,
            max_tokens=max_tokens,
            priority=priority,
            cache_salt=salt,
        )
        self.requests[request.request_id] = request
        self.harness.add(request)

    @rule(count=st.integers(1, 6))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.harness.step()

    @precondition(lambda self: self.live())
    @rule(data=st.data(), between=st.booleans())
    def abort(self, data: st.DataObject, between: bool) -> None:
        request_id = data.draw(st.sampled_from(self.live()))
        if between:
            self.harness.step(abort_between=[request_id])
        else:
            output = self.harness.scheduler.abort(request_id)
            assert output is not None
            self.harness.record([output])

    @invariant()
    def budgets_hold(self) -> None:
        for share in self.harness.shares[-6:]:
            assert len(share) <= 4
            assert sum(share.values()) <= 9
            assert all(count >= 1 for count in share.values())

    @invariant()
    def adds_up(self) -> None:
        self.harness.scheduler.check_integrity()
        if not self.live():
            assert not self.harness.scheduler.has_requests
            assert self.harness.scheduler.load_report().num_free_blocks == NUM_BLOCKS

    def teardown(self) -> None:
        # No starvation: every token of every request is computed at least once per preemption,
        # and some request makes progress in each step.
        self.harness.run(max_steps=200 * (1 + len(self.requests)))
        assert self.harness.scheduler.load_report().num_free_blocks == NUM_BLOCKS
        for request_id, request in self.requests.items():
            self._check_answer(request_id, request)

    def _check_answer(self, request_id: str, request: GenerateRequest) -> None:
        prompt, got = request.prompt_token_ids, self.harness.tokens(request_id)
        room = MAX_MODEL_LEN - len(prompt)
        expected = scripted_output(prompt, min(request.params.max_tokens, room))
        last = self.harness.last(request_id)
        assert last.usage.num_output_tokens == len(got)
        assert last.usage.num_cached_tokens < len(prompt)
        if last.finish_reason is FinishReason.ABORT:
            assert got == expected[: len(got)]
        else:
            assert last.finish_reason is FinishReason.LENGTH
            assert got == expected


class DraftingMachine(SchedulerMachine):
    """The same with drafts, two in three of them right."""

    def make_proposer(self) -> Proposer:
        return ScriptProposer(wrong_every=3)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestDraftingMachine = DraftingMachine.TestCase
TestDraftingMachine.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
