"""A model taken apart: attention and experts in processes of their own, one of them killed.

    python examples/04_disaggregated.py [MODEL]

Serves MODEL with one DP group and two expert workers, asks a question, asks it again and kills an
expert worker in the middle of the answer. The stream goes on and says the same. Prints both texts,
the longest gap between two pieces of each, and what `xds status` shows afterwards.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from xdeepserve.launch.server_process import ServerProcess

MODEL = "smollm2-135m-moe8"
WORKERS = ("--attention", "1", "--expert", "2")
VICTIM = "expert0"
KILL_AFTER = 12  # pieces of text
QUESTION = {
    "messages": [{"role": "user", "content": "Name three rivers and say where they flow."}],
    "temperature": 0,
    "max_tokens": 48,
    "stream": True,
}


def main() -> None:
    """Two questions, one murder."""
    model = sys.argv[1] if len(sys.argv) > 1 else MODEL
    # A folder of our own, so that `xds status` finds this service and no other.
    with tempfile.TemporaryDirectory() as run_dir:
        os.environ["XDEEPSERVE_RUN_DIR"] = run_dir
        with ServerProcess(model, *WORKERS) as server:
            undisturbed = listen("undisturbed", ask(server))
            disturbed = listen(f"{VICTIM} killed", ask(server), victim=pid_of(VICTIM))
            print(wait_until_complete())
            assert server.stop() == 0
    assert disturbed == undisturbed, "the answers differ"
    print("both answers are the same")


def ask(server: ServerProcess) -> Iterator[str]:
    """The answer, piece by piece."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    body = json.dumps(QUESTION | {"model": server.model})
    connection.request("POST", "/v1/chat/completions", body)
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            yield event["choices"][0]["delta"].get("content") or ""
    connection.close()


def listen(title: str, pieces: Iterator[str], victim: int | None = None) -> str:
    """The whole text; kills the victim on the way."""
    text, longest_s, last_s = "", 0.0, 0.0
    for count, piece in enumerate(pieces):
        now_s = time.perf_counter()
        if count > 1:  # the first piece is only the role, the second waited for the prompt
            longest_s = max(longest_s, now_s - last_s)
        last_s = now_s
        text += piece
        if count == KILL_AFTER and victim is not None:
            os.kill(victim, signal.SIGKILL)
    print(f"[{title}: longest gap {longest_s * 1e3:.0f} ms]\n{text}\n", flush=True)
    return text


def status(*flags: str) -> subprocess.CompletedProcess[str]:
    """`xds status`; exit code 0 when all workers can serve."""
    command = [sys.executable, "-m", "xdeepserve.launch.cli", "status", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def pid_of(worker: str) -> int:
    """Process of a worker."""
    members = json.loads(status("--json").stdout)["membership"]["members"]
    (member,) = [member for member in members if member["spec"]["name"] == worker]
    return member["process"]["pid"]


def wait_until_complete() -> str:
    """The table, once the killed worker has a successor."""
    deadline_s = time.monotonic() + 30
    while (done := status()).returncode != 0:
        assert time.monotonic() < deadline_s, f"a worker stays away:\n{done.stdout}{done.stderr}"
    return done.stdout


if __name__ == "__main__":
    main()
