"""Long texts: refused before work goes into them, bounded waiting, dropped with their client."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tests.unit.maas.asgi import MODEL, Call, call, open_app
from tests.unit.maas.replay_engine import INFO, ReplayEngine, steps_of
from tests.unit.text.byte_tokenizer import byte_backend, byte_tokenizer
from xdeepserve.config import GatewayConfig
from xdeepserve.errors import CapacityError, PayloadTooLarge, RequestError
from xdeepserve.maas import prompts as prompts_module
from xdeepserve.maas.app import create_app
from xdeepserve.maas.prompts import INLINE_CHARS, MAX_TOKENIZE_BYTES, NUM_THREADS, PromptEncoder
from xdeepserve.text.tokenizer import Tokenizer

LONG = "x" * (INLINE_CHARS + 1)
PATH = "/v1/completions"


class GatedTokenizer(Tokenizer):
    """Waits for a gate in each `encode`, as a slow one would.

    Attributes:
        num_encoded: how many texts were begun.
    """

    def __init__(self) -> None:
        super().__init__(byte_backend())
        self.gate = threading.Event()
        self.num_encoded = 0

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.num_encoded += 1
        assert self.gate.wait(10)
        return super().encode(text, add_special_tokens=add_special_tokens)


async def _begun(tokenizer: GatedTokenizer, count: int) -> None:
    async with asyncio.timeout(10):
        while tokenizer.num_encoded < count:
            await asyncio.sleep(0)


def _encode(encoder: PromptEncoder, text: str) -> asyncio.Task[list[int]]:
    return asyncio.create_task(encoder.tokenize(text, add_special_tokens=False))


async def test_what_cannot_fit_is_refused_before_tokenizing() -> None:
    tokenizer = GatedTokenizer()
    encoder = PromptEncoder(tokenizer, None, INFO)
    longest = len("<|im_start|>")
    text = "é" * (INFO.max_model_len * longest // 2) + "x"
    with pytest.raises(RequestError) as caught:
        await encoder.encode(text, add_special_tokens=True, param="prompt")
    assert caught.value.code == "context_length_exceeded"
    assert f"at least {INFO.max_model_len + 1} tokens" in caught.value.message
    assert str(INFO.max_model_len) in caught.value.message
    with pytest.raises(RequestError, match="at least"):
        await encoder.render_chat([{"content": text}], add_generation_prompt=True)
    assert tokenizer.num_encoded == 0
    encoder.close()


async def test_tokenize_has_its_own_limit() -> None:
    encoder = PromptEncoder(byte_tokenizer(), None, INFO)
    assert len(await _encode(encoder, "é" * INFO.max_model_len * 9)) > INFO.max_model_len
    with pytest.raises(PayloadTooLarge, match=str(MAX_TOKENIZE_BYTES)):
        await _encode(encoder, "é" * (MAX_TOKENIZE_BYTES // 2) + "x")
    encoder.close()


async def test_waiting_text_is_bounded_and_makes_room_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompts_module, "MAX_QUEUED_SIZE", 3 * len(LONG))
    monkeypatch.setattr(prompts_module, "MIN_QUEUED_SIZE", 1)
    tokenizer = GatedTokenizer()
    encoder = PromptEncoder(tokenizer, None, INFO)
    waiting = [_encode(encoder, LONG) for _ in range(3)]
    await _begun(tokenizer, NUM_THREADS)
    with pytest.raises(CapacityError, match="waiting"):
        await _encode(encoder, LONG)
    tokenizer.gate.set()
    assert [len(ids) for ids in await asyncio.gather(*waiting)] == [len(LONG)] * 3
    assert len(await _encode(encoder, LONG * 4)) == 4 * len(LONG)
    encoder.close()


@pytest.mark.parametrize("path", [PATH, "/tokenize"])
async def test_a_client_that_left_costs_no_more_tokenizing(path: str) -> None:
    tokenizer = GatedTokenizer()
    engine = ReplayEngine(steps_of("x"))
    app = create_app(engine, tokenizer, GatewayConfig(), model_names=[MODEL])
    calls = [Call(app, path, {"model": MODEL, "prompt": LONG}) for _ in range(NUM_THREADS + 2)]
    await _begun(tokenizer, NUM_THREADS)
    for running in calls:
        running.disconnect()
    await asyncio.gather(*(running.task for running in calls))
    tokenizer.gate.set()
    reply = await call(app, "/tokenize", {"prompt": LONG})
    assert reply.json()["count"] == len(LONG)
    assert tokenizer.num_encoded == NUM_THREADS + 1
    assert engine.requests == []
    app.state.gateway.prompts.close()


async def test_many_prompts_times_choices_are_refused() -> None:
    config = GatewayConfig(max_n=300, max_prompts=300)
    app = open_app(ReplayEngine(), config=config)
    reply = await call(app, PATH, {"model": MODEL, "prompt": ["a"] * 129, "n": 2})
    assert (reply.status, reply.json()["error"]["param"]) == (400, "n")
    assert "256" in reply.json()["error"]["message"]
