"""`xds serve --attention N` with the real model: same texts as colocated, through a crash."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.multiproc.cluster_harness import run_folder
from xdeepserve.launch.cli import main
from xdeepserve.launch.server_process import ServerProcess

pytestmark = [pytest.mark.weights, pytest.mark.slow]

MODEL = "smollm2-135m"
PROMPT = "Once upon a time"
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def expected() -> str:
    with ServerProcess(MODEL) as server:
        return "".join(stream(server))


@pytest.fixture
def folder() -> Iterator[Path]:
    with run_folder() as folder:
        yield folder


def stream(server: ServerProcess) -> Iterator[str]:
    """Text of a greedy completion, piece by piece."""
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        client.completions.create(
            model=server.model,
            prompt=PROMPT,
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
        ) as chunks,
    ):
        for chunk in chunks:
            yield chunk.choices[0].text if chunk.choices else ""


def workers(capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Pid by name, as `xds status` tells."""
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    members = json.loads(capsys.readouterr().out)["membership"]["members"]
    return {member["spec"]["name"]: member["process"]["pid"] for member in members}


def test_crash_and_scaling_under_a_stream(
    expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ServerProcess(MODEL, "--attention", "1") as server:
        pieces = stream(server)
        text = next(pieces) + next(pieces)
        os.kill(workers(capsys)["dp0"], signal.SIGKILL)
        assert text + "".join(pieces) == expected
        assert main(["scale", "attention=2"]) == 0
        assert sorted(workers(capsys)) == ["dp0", "dp1"]
        pieces = stream(server)
        text = next(pieces) + next(pieces)
        assert main(["scale", "attention=1"]) == 0
        assert text + "".join(pieces) == expected
        assert sorted(workers(capsys)) == ["dp0"]
        assert server.stop() == 0
    assert list(folder.iterdir()) == []
