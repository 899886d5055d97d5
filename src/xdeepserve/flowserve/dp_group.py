"""DPGroup: one autonomous engine. Inbox -> step -> outbox, in a thread of its own.

The step loop owns scheduler and executor; other threads only append to the inbox and read the
latest load report. No group ever waits for another.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from xdeepserve import garbage
from xdeepserve.clock import Clock
from xdeepserve.errors import CapacityError, EngineDeadError, RequestError
from xdeepserve.flowserve.executor import Executor
from xdeepserve.flowserve.scheduler import Scheduler
from xdeepserve.flowserve.step import StepPlan
from xdeepserve.messages import (
    EngineInfo,
    FinishReason,
    GenerateRequest,
    LoadReport,
    TokenOutput,
    Usage,
    num_blocks_needed,
)
from xdeepserve.transformerless.stage_times import Stage, StageTimes

logger = logging.getLogger(__name__)

IDLE_WAKE_S: Final = 1.0
"""An idle loop wakes this often to beat its heart."""

STALL_TIMEOUT_S: Final = 600.0
"""A loop that has finished no step for so long counts as dead."""

DEFAULT_NAME: Final = "xds:dp0"
"""Of the only group of a process."""

Outbox = Callable[[list[TokenOutput]], None]


class _Abort(NamedTuple):
    request_id: str


class DPGroup:
    """Scheduler, executor and the loop between them.

    Every accepted request gets exactly one terminal output, whatever happens to the loop.
    """

    def __init__(
        self,
        *,
        info: EngineInfo,
        scheduler: Scheduler,
        executor: Executor,
        clock: Clock,
        max_num_waiting: int,
        stage_times: StageTimes | None = None,
        name: str = DEFAULT_NAME,
    ) -> None:
        """Make a stopped group; `start` runs it.

        Args:
            info: what frontends are told.
            scheduler: owned by the loop from now on.
            executor: likewise; closed when the loop ends.
            clock: for the heartbeat and the drain deadline.
            max_num_waiting: most accepted requests that do not run yet.
            stage_times: where the loop's share of a step is counted; None = nowhere.
            name: of the loop's thread.
        """
        self.info = info
        self._scheduler = scheduler
        self._executor = executor
        self._clock = clock
        self._max_num_waiting = max_num_waiting
        self._times = stage_times or StageTimes()
        self._inbox: deque[GenerateRequest | _Abort] = deque()
        self._num_inbox_blocks = 0
        self._wakeup = threading.Condition()
        self._outbox: Outbox = _discard
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._plan: StepPlan | None = None
        # Outputs of the step under way; kept here, so that a failing step does not lose them.
        self._outputs: list[TokenOutput] = []
        self._death: str | None = None
        self._close_deadline_s: float | None = None
        self._last_progress_s = clock.monotonic()
        self._load = scheduler.load_report()

    # -- called from other threads --------------------------------------------------------------

    def start(self, outbox: Outbox) -> None:
        """Warm up and run the loop.

        Args:
            outbox: called on the loop's thread with each step's outputs; must not block or raise.
        """
        self._outbox = outbox
        self._executor.warm_up()
        self._thread.start()

    def submit(self, request: GenerateRequest) -> None:
        """Accept a valid request whose id is not in use; returns at once.

        Raises:
            CapacityError: the waiting queue is full, or the group is closing.
            EngineDeadError: the loop ended.
        """
        with self._wakeup:
            self._check_accepts()
            self._inbox.append(request)
            self._num_inbox_blocks += num_blocks_needed(request, self.info.block_size)
            self._wakeup.notify()

    def _check_accepts(self) -> None:
        if self._death is not None:
            raise EngineDeadError(f"the engine is dead: {self._death}")
        if self._close_deadline_s is not None:
            raise CapacityError("the engine is shutting down; send the request elsewhere")
        num_waiting = len(self._inbox) + self._scheduler.num_waiting
        if num_waiting >= self._max_num_waiting:
            raise CapacityError(
                f"{num_waiting} requests are waiting, the limit is max_num_waiting="
                f"{self._max_num_waiting}; retry later"
            )

    def abort(self, request_id: str) -> None:
        """Ask for a request's end; takes effect before the running step's result is counted."""
        with self._wakeup:
            self._inbox.append(_Abort(request_id))
            self._wakeup.notify()

    def load(self) -> LoadReport:
        """Snapshot of the latest step, with the inbox counted as waiting. Never blocks."""
        load = self._load
        return msgspec.structs.replace(
            load,
            num_waiting=load.num_waiting + len(self._inbox),
            num_reserved_blocks=load.num_reserved_blocks + self._num_inbox_blocks,
        )

    def is_alive(self) -> bool:
        """Whether the loop runs and has made progress within the stall timeout."""
        if self._death is not None or not self._thread.is_alive():
            return False
        return self._clock.monotonic() - self._last_progress_s < STALL_TIMEOUT_S

    def begin_close(self, *, drain_timeout_s: float) -> None:
        """Refuse new requests; end when all are finished, or abort the rest at the timeout."""
        with self._wakeup:
            if self._close_deadline_s is None:
                self._close_deadline_s = self._clock.monotonic() + drain_timeout_s
            self._wakeup.notify()

    def join(self, *, timeout_s: float) -> bool:
        """Wait for the loop's end; False on timeout."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # -- the loop -------------------------------------------------------------------------------

    def step(self) -> list[TokenOutput]:
        """One step: decide, compute, commit. Called by the loop (and by tests that have none)."""
        begun_s = self._clock.monotonic()
        with self._times.measure(Stage.SCHEDULE):
            is_news = self._drain_inbox()
            plan = self._plan = self._scheduler.schedule()
            if is_news:
                # What has just left the inbox must be seen while the step runs.
                self._load = self._scheduler.load_report()
        if not plan.is_empty:
            result = self._executor.execute(plan=plan)
            with self._times.measure(Stage.UPDATE):
                self._drain_inbox()
                self._outputs += self._scheduler.update(plan, result)
                self._scheduler.record_duration(plan, result, self._clock.monotonic() - begun_s)
                self._load = self._scheduler.load_report()
        self._last_progress_s = self._clock.monotonic()
        return self._take_outputs()

    def _take_outputs(self) -> list[TokenOutput]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def _drain_inbox(self) -> bool:
        """Hand new requests and aborts to the scheduler; keeps the terminal outputs due.

        Returns:
            Whether there was anything.
        """
        if not self._inbox:
            return False
        with self._wakeup:
            while self._inbox:
                ended = self._receive(self._inbox.popleft())
                if ended is not None:
                    self._outputs.append(ended)
            self._num_inbox_blocks = 0
        return True

    def _receive(self, message: GenerateRequest | _Abort) -> TokenOutput | None:
        """Act on one message; returns the terminal output it leads to, if any."""
        if isinstance(message, _Abort):
            return self._scheduler.abort(message.request_id)
        try:
            self._scheduler.add(message)
        except RequestError as exc:
            return _refused(message, exc.message)
        return None

    def _run(self) -> None:
        try:
            while self._await_work():
                self._publish(self.step())
            self._publish(self._abort_rest())
        except Exception as exc:  # loop top: whatever failed, every request gets its answer
            logger.exception("the step loop failed; plan: %s", _describe(self._plan))
            self._die(f"{type(exc).__name__}: {exc}")
        finally:
            self._executor.close()

    def _await_work(self) -> bool:
        """Sleep while idle; False when the loop should end."""
        is_collected = False
        with self._wakeup:
            while not self._has_work() and self._close_deadline_s is None:
                self._last_progress_s = self._clock.monotonic()
                if not self._wakeup.wait(IDLE_WAKE_S):
                    self._scheduler.check_integrity()
                    if not is_collected:
                        garbage.collect_idle()
                        is_collected = True
            if self._close_deadline_s is None:
                return True
            return self._has_work() and self._clock.monotonic() < self._close_deadline_s

    def _has_work(self) -> bool:
        return bool(self._inbox) or self._scheduler.has_requests

    def _publish(self, outputs: list[TokenOutput]) -> None:
        if outputs:
            self._outbox(outputs)

    def _abort_rest(self) -> list[TokenOutput]:
        """Terminal outputs of whatever the drain left over."""
        self._drain_inbox()
        self._outputs += self._scheduler.abort_all()
        self._load = self._scheduler.load_report()
        return self._take_outputs()

    def _die(self, reason: str) -> None:
        """Mark the engine dead and fail every accepted request, those in the inbox included."""
        with self._wakeup:
            self._death = reason
            late = [m for m in self._inbox if isinstance(m, GenerateRequest)]
            self._inbox.clear()
            self._num_inbox_blocks = 0
        error = f"the engine failed: {reason}"
        self._outputs += self._scheduler.fail_all(error)
        self._outputs += [_refused(request, error) for request in late]
        self._publish(self._take_outputs())


def _discard(outputs: list[TokenOutput]) -> None:
    """The outbox of a group that is not started."""


def _refused(request: GenerateRequest, error: str) -> TokenOutput:
    """The terminal output of a request that never reached the scheduler."""
    return TokenOutput(
        request_id=request.request_id,
        token_ids=[],
        usage=Usage(len(request.prompt_token_ids), 0, len(request.resume_token_ids)),
        finish_reason=FinishReason.ERROR,
        error=error,
    )


def _describe(plan: StepPlan | None) -> str:
    """A plan for the log: ids and counts, no contents."""
    if plan is None:
        return "none"
    rows = (
        f"{item.request_id}[{item.num_computed_tokens}+{item.num_rows}"
        f"/{len(item.token_ids)}] blocks={item.block_ids.tolist()}"
        for item in plan.scheduled
    )
    return f"step {plan.step_idx}, {plan.num_tokens} tokens: " + ", ".join(rows)
