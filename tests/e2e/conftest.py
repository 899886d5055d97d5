"""One real server (SmolLM2 upcycled to a MoE, bf16) for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from xdeepserve.launch.server_process import ServerProcess

MODEL = "smollm2-135m-moe8"


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    arguments = ("--max-num-seqs", "64", "--num-kv-blocks", "4096")
    with ServerProcess(MODEL, *arguments) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened
