"""Contract of EngineClient, over every implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tests.unit.flowserve.builders import make_config, make_executor, make_group, make_request
from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.engine_api import EngineClient
from xdeepserve.errors import CapacityError, RequestError
from xdeepserve.flowserve.dp_server import DPServer
from xdeepserve.flowserve.engine_client import InProcClient
from xdeepserve.flowserve.remote_engine import RemoteEngine
from xdeepserve.flowserve.router import RouterEngine
from xdeepserve.messages import EngineInfo, FinishReason, TokenOutput
from xdeepserve.testing.scripted_engine import DEFAULT_INFO, ScriptedEngine
from xdeepserve.testing.scripted_executor import scripted_output

TIMEOUT_S = 30.0


def in_proc() -> EngineClient:
    config = make_config()
    client = InProcClient(make_group(config, make_executor(config)))
    client.start()
    return client


def scripted() -> EngineClient:
    info = EngineInfo(
        **{f: getattr(DEFAULT_INFO, f) for f in DEFAULT_INFO.__struct_fields__}
        | {"vocab_size": 128, "max_model_len": 64}
    )
    return ScriptedEngine(info=info)


class Remote:
    """A group behind a socket, both ends on this event loop."""

    def __init__(self, run_dir: Path, name: str = "dp0") -> None:
        config = make_config()
        group = make_group(config, make_executor(config), clock=SYSTEM_CLOCK)
        self.path = run_dir / f"{name}.sock"
        self.server = DPServer(group, self.path)

    async def start(self) -> RemoteEngine:
        await self.server.start()
        return await RemoteEngine.connect(self.path, timeout_s=TIMEOUT_S)


@pytest.fixture(params=["in_proc", "scripted", "remote", "router", "remote_router"])
async def client(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[EngineClient]:
    remotes: list[Remote] = []
    engine: EngineClient
    match request.param:
        case "in_proc":
            engine = in_proc()
        case "scripted":
            engine = scripted()
        case "remote":
            remotes = [Remote(tmp_path)]
            engine = await remotes[0].start()
        case "router":
            engine = router({"dp0": in_proc(), "dp1": in_proc()})
        case _:
            remotes = [Remote(tmp_path, "dp0"), Remote(tmp_path, "dp1")]
            engine = router({r.path.stem: await r.start() for r in remotes})
    yield engine
    await engine.close(drain_timeout_s=0.0)
    for remote in remotes:
        await remote.server.close(drain_timeout_s=0.0)


def router(members: dict[str, EngineClient]) -> RouterEngine:
    engine = RouterEngine(next(iter(members.values())).info)
    for name, member in members.items():
        engine.add(name, member)
    return engine


async def collect(stream: AsyncIterator[TokenOutput]) -> list[TokenOutput]:
    async with asyncio.timeout(TIMEOUT_S):
        return [output async for output in stream]


def ids_of(outputs: list[TokenOutput]) -> list[int]:
    return [i for output in outputs for i in output.token_ids]


async def test_outputs_come_in_order_and_end_with_one_terminal_output(
    client: EngineClient,
) -> None:
    outputs = await collect(client.generate(request=make_request("a", max_tokens=6)))
    assert ids_of(outputs) == scripted_output([5, 6, 7], 6)
    assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason is FinishReason.LENGTH
    usage = outputs[-1].usage
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (3, 6)


async def test_requests_run_side_by_side(client: EngineClient) -> None:
    prompts = {f"r{i}": [3 + i, 4 + i] for i in range(12)}
    streams = [client.generate(request=make_request(i, p)) for i, p in prompts.items()]
    results = await asyncio.gather(*(collect(stream) for stream in streams))
    for prompt, outputs in zip(prompts.values(), results, strict=True):
        assert ids_of(outputs) == scripted_output(prompt, 4)


async def test_logprobs_come_one_per_id(client: EngineClient) -> None:
    outputs = await collect(client.generate(request=make_request("a", logprobs=0)))
    for output in outputs:
        assert output.logprobs is not None
        assert len(output.logprobs) == len(output.token_ids)


async def test_abort_ends_the_stream_with_abort(client: EngineClient) -> None:
    stream = client.generate(request=make_request("a", max_tokens=60))
    first = await anext(stream)
    await client.abort(request_id="a")
    outputs = [first, *await collect(stream)]
    assert outputs[-1].finish_reason in {FinishReason.ABORT, FinishReason.LENGTH}
    expected = scripted_output([5, 6, 7], 60)
    assert ids_of(outputs) == expected[: len(ids_of(outputs))]


async def test_abort_of_an_unknown_id_is_no_error(client: EngineClient) -> None:
    await client.abort(request_id="nobody")


async def test_closing_the_stream_early_leaves_the_engine_idle(client: EngineClient) -> None:
    stream = client.generate(request=make_request("a", max_tokens=60))
    await anext(stream)
    await stream.aclose()
    outputs = await collect(client.generate(request=make_request("b")))
    assert ids_of(outputs) == scripted_output([5, 6, 7], 4)
    async with asyncio.timeout(TIMEOUT_S):
        while client.load().num_running or client.load().num_waiting:
            await asyncio.sleep(0)
    load = client.load()
    assert load.num_free_blocks == load.num_total_blocks


async def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(
    client: EngineClient,
) -> None:
    with pytest.raises(RequestError, match="64") as caught:
        client.generate(request=make_request("a", [5] * 77))
    assert "77" in caught.value.message
    assert caught.value.code == "context_length_exceeded"
    longest = await collect(client.generate(request=make_request("b", [5] * 63)))
    assert longest[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([5, 128], {}, "token id 128"),
        ([5, -1], {}, "token id -1"),
        ([5], {"max_tokens": 0}, "max_tokens=0"),
    ],
)
async def test_a_wrong_request_is_refused_at_once(
    client: EngineClient, prompt: list[int], params: dict[str, int], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        client.generate(request=make_request("a", prompt, **params))
    assert client.load().num_waiting == 0


async def test_close_refuses_new_requests_and_is_idempotent(client: EngineClient) -> None:
    assert client.is_alive()
    await client.close(drain_timeout_s=TIMEOUT_S)
    await client.close(drain_timeout_s=TIMEOUT_S)
    assert not client.is_alive()
    with pytest.raises(CapacityError):
        client.generate(request=make_request("a"))


async def test_a_resumed_request_goes_on_where_it_stopped(client: EngineClient) -> None:
    whole = scripted_output([5, 6, 7], 9)
    request = msgspec.structs.replace(make_request("a", max_tokens=9), resume_token_ids=whole[:4])
    outputs = await collect(client.generate(request=request))
    assert ids_of(outputs) == whole[4:]
    usage = outputs[-1].usage
    assert (usage.num_prompt_tokens, usage.num_output_tokens) == (3, 9)
    assert outputs[-1].finish_reason is FinishReason.LENGTH


async def test_a_finished_request_cannot_be_resumed(client: EngineClient) -> None:
    request = msgspec.structs.replace(make_request("a"), resume_token_ids=[9, 9, 9, 9])
    with pytest.raises(RequestError, match="4 output tokens"):
        client.generate(request=request)
