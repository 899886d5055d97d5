"""Streams: merging, coalescing, cleaning up, errors, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from tests.unit.maas.asgi import MODEL, Call, call, events, open_app
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from xdeepserve.errors import CapacityError, EngineDeadError
from xdeepserve.messages import FinishReason, TokenOutput, Usage

ASK = {"model": MODEL, "prompt": "hello", "stream": True}
PATH = "/v1/completions"


def _text(body: bytes, index: int = 0) -> str:
    choices = [c for e in events(body) if e != "[DONE]" for c in e["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


async def test_streaming_client_that_goes_away_frees_the_request() -> None:
    engine = ReplayEngine(steps_of("x" * 300, step=1))
    running = Call(open_app(engine), PATH, ASK)
    await running.first_body.wait()
    engine.gate.clear()
    running.disconnect()
    await running.task
    assert engine.aborted == [engine.requests[0].request_id]
    assert engine.closed == engine.aborted
    assert not any(message.get("more_body") is False for message in running.sent[1:])


@pytest.mark.parametrize("stream", [False, True])
async def test_client_that_goes_away_before_the_first_token(stream: bool) -> None:
    engine = ReplayEngine(steps_of("never"))
    engine.gate.clear()
    running = Call(open_app(engine), PATH, {**ASK, "stream": stream, "n": 3})
    while len(engine.requests) < 3:
        await asyncio.sleep(0)
    running.disconnect()
    await running.task
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)
    assert sorted(engine.closed) == sorted(engine.aborted)
    assert running.sent == []


async def test_cancelled_server_task_frees_the_request() -> None:
    engine = ReplayEngine(steps_of("never"))
    engine.gate.clear()
    running = Call(open_app(engine), PATH, ASK)
    while not engine.requests:
        await asyncio.sleep(0)
    running.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running.task
    assert engine.closed == engine.aborted == [engine.requests[0].request_id]


async def test_finished_requests_are_not_aborted() -> None:
    engine = ReplayEngine(steps_of("done"))
    await call(open_app(engine), PATH, ASK)
    assert engine.aborted == []
    assert len(engine.closed) == 1


async def test_stop_string_aborts_what_is_left() -> None:
    engine = ReplayEngine(steps_of("one two three", step=2))
    reply = await call(open_app(engine), PATH, {**ASK, "stop": "two"})
    assert _text(reply.body) == "one "
    assert engine.aborted == [engine.requests[0].request_id]


@pytest.mark.parametrize("step", [1, 2, 3, 5, 13, 14])
async def test_ids_behind_a_stop_string_are_not_billed(step: int) -> None:
    engine = ReplayEngine(steps_of("one two three", step=step))
    reply = await call(open_app(engine), PATH, {**ASK, "stream": False, "stop": "two"})
    assert json.loads(reply.body)["usage"]["completion_tokens"] == len("one two")


async def test_choices_are_merged_by_index_with_their_own_seeds() -> None:
    engine = ReplayEngine(steps_of("first"), steps_of("the second"), steps_of("x"), steps_of("yy"))
    ask = {**ASK, "prompt": ["p", "q"], "n": 2, "seed": -1}
    reply = await call(open_app(engine), PATH, ask)
    assert [_text(reply.body, i) for i in range(4)] == ["first", "the second", "x", "yy"]
    seeds = [request.params.seed for request in engine.requests]
    assert seeds[0] == seeds[2] == 2**64 - 1
    assert seeds[1] == seeds[3] != seeds[0]


async def test_tokens_of_one_step_travel_in_one_event() -> None:
    engine = ReplayEngine(steps_of("abcdef", step=7))
    reply = await call(open_app(engine), PATH, ASK)
    chunks = events(reply.body)
    assert len(chunks) == 2
    assert chunks[0]["choices"][0] == {
        "index": 0,
        "text": "abcdef",
        "logprobs": None,
        "finish_reason": "stop",
    }


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("error", [CapacityError("full"), EngineDeadError("gone")])
async def test_refusal_by_the_engine_is_a_plain_503(error: Exception, stream: bool) -> None:
    engine = ReplayEngine([])
    engine.error = error
    reply = await call(open_app(engine), PATH, {**ASK, "stream": stream})
    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error"]["message"] == str(error)


async def test_one_refused_choice_ends_them_all() -> None:
    class OneSeat(ReplayEngine):
        def generate(self, *, request):  # type: ignore[no-untyped-def]
            if self.requests:
                raise CapacityError("full")
            return super().generate(request=request)

    engine = OneSeat(steps_of("x" * 50))
    engine.gate.clear()
    reply = await call(open_app(engine), PATH, {**ASK, "n": 2})
    assert reply.status == 503
    assert engine.closed == engine.aborted == [engine.requests[0].request_id]


def _failing(reason: FinishReason) -> list[TokenOutput]:
    last = TokenOutput(
        request_id="",
        token_ids=[],
        usage=Usage(1),
        finish_reason=reason,
        error="secret /etc/path" if reason is FinishReason.ERROR else None,
    )
    return [*steps_of("ab", step=1)[:2], last]


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        (FinishReason.ERROR, "server_error", "engine_error"),
        (FinishReason.ABORT, "server_error", "aborted"),
    ],
)
async def test_error_in_mid_stream_is_a_data_frame(
    reason: FinishReason, kind: str, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    reply = await call(open_app(ReplayEngine(_failing(reason))), PATH, ASK)
    assert reply.status == 200
    last = events(reply.body)[-1]
    assert (last["error"]["type"], last["error"]["code"]) == (kind, code)
    assert b"secret" not in reply.body
    assert reply.sent[-1]["more_body"] is False


async def test_error_without_stream_is_a_500_that_reveals_nothing() -> None:
    engine = ReplayEngine(_failing(FinishReason.ERROR))
    reply = await call(open_app(engine), PATH, {**ASK, "stream": False})
    assert reply.status == 500
    assert b"secret" not in reply.body


@pytest.mark.parametrize("stream", [False, True])
async def test_a_bug_is_a_generic_500_with_the_request_id(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ReplayEngine([])
    engine.error = ZeroDivisionError("inner detail")
    ask = {**ASK, "stream": stream}
    reply = await call(open_app(engine), PATH, ask, headers={"x-request-id": "abc-1"})
    assert reply.status == 500
    assert "abc-1" in reply.json()["error"]["message"]
    assert b"inner detail" not in reply.body
    assert "inner detail" in caplog.text


async def test_an_engine_stream_without_end_is_an_error() -> None:
    reply = await call(open_app(ReplayEngine(steps_of("abcdef")[:1])), PATH, ASK)
    assert (reply.status, reply.json()["error"]["type"]) == (503, "server_error")
