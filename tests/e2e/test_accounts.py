"""Keys, bills and the admin API as the official SDK and an operator meet them, on a real server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.conftest import MODEL
from xdeepserve.launch.server_process import ServerProcess

pytestmark = [pytest.mark.weights, pytest.mark.slow]

QUESTION: Any = [{"role": "user", "content": "Count to five."}]
PRICES = 'version: "e2e"\nmodels: {"*": {default: {input: 3_000_000, output: 5_000_000}}}\n'


@dataclass
class Service:
    """A running service with accounts."""

    server: ServerProcess
    env: dict[str, str]
    admin_url: str

    def xds(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "xdeepserve.launch.cli", *arguments]
        env = os.environ | self.env
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, check=True, timeout=60
        )
        return json.loads(done.stdout)

    def client(self, secret: str, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.server.url}/v1", api_key=secret, **options)

    def new_tenant(self, name: str, *budget: str) -> str:
        self.xds("admin", "tenant", "create", name, "--json")
        if budget:
            self.xds("admin", "budget", *budget, "--tenant", name, "--json")
        (new,) = self.xds("admin", "key", "create", "--tenant", name, "--json")
        return str(new["secret"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("accounts")
    (folder / "prices.yaml").write_text(PRICES)
    env = {"XDEEPSERVE_DATABASE_URL": f"sqlite:///{folder / 'service.db'}"}
    port = free_port()
    first = Service(None, env, f"http://127.0.0.1:{port}")  # type: ignore[arg-type]
    first.new_tenant("operator")
    flags = ["--prices", str(folder / "prices.yaml"), "--admin-port", str(port)]
    with ServerProcess(MODEL, *flags, env=env) as server:
        yield Service(server, env, first.admin_url)


def ask(client: OpenAI, **changes: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=8, temperature=0, **changes
    )


def usage(service: Service, tenant: str) -> Any:
    """When its requests are settled."""
    deadline_s = time.monotonic() + 10
    while not (rows := service.xds("usage", "--tenant", tenant, "--by", "--format", "json")):
        assert time.monotonic() < deadline_s
    return rows[0]


def test_a_key_is_needed(service: Service) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(service.client("sk-wrong", max_retries=0))
    assert ask(service.client(service.new_tenant("a"))).choices[0].message.content


def test_the_bill_is_the_usage(service: Service) -> None:
    client = service.client(service.new_tenant("b"))
    replies = [ask(client).usage for _ in range(2)]
    stream = ask(client, stream=True, stream_options={"include_usage": True})
    replies.append([chunk.usage for chunk in stream][-1])
    deadline_s = time.monotonic() + 10
    while (row := usage(service, "b"))["num_requests"] < 3:
        assert time.monotonic() < deadline_s
    prompt = sum(reply.prompt_tokens for reply in replies)
    completion = sum(reply.completion_tokens for reply in replies)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (prompt, completion)
    assert row["charge_micro"] == 3 * prompt + 5 * completion


@pytest.mark.parametrize(("kind", "status"), [("credit", 402), ("monthly", 429)])
def test_without_money_the_sdk_does_not_try_again(service: Service, kind: str, status: int) -> None:
    client = service.client(service.new_tenant(kind, kind, "0.000001"), max_retries=5)
    begun_s = time.monotonic()
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client)
    assert (caught.value.status_code, caught.value.code) == (status, "insufficient_quota")
    assert time.monotonic() - begun_s < 1.0


def test_a_revoked_key_ends(service: Service) -> None:
    secret = service.new_tenant("c")
    client = service.client(secret, max_retries=0)
    ask(client)
    (key,) = service.xds("admin", "key", "list", "--tenant", "c", "--json")
    service.xds("admin", "key", "revoke", key["id"], "--json")
    time.sleep(1.1)
    with pytest.raises(openai.AuthenticationError):
        ask(client)


def test_the_admin_api(service: Service) -> None:
    (new,) = service.xds(
        "admin", "key", "create", "--tenant", "operator", "--scope", "admin", "--json"
    )
    headers = {"Authorization": f"Bearer {new['secret']}"}
    request = urllib.request.Request(f"{service.admin_url}/admin/tenants", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert "operator" in {tenant["name"] for tenant in json.load(reply)}
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{service.admin_url}/admin/tenants", timeout=10)
    with pytest.raises(openai.AuthenticationError):
        ask(service.client(new["secret"], max_retries=0))
