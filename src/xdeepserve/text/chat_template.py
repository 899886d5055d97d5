"""Chat messages -> prompt text, with the model's own Jinja template, in a killable child process.

A thread cannot be stopped while a template loops or multiplies strings, a process can: rendering
runs in `template_worker`, which the kernel kills at its deadline or memory limit. The child starts
on first use, lives on, and is started afresh after it was killed.
"""

from __future__ import annotations

import select
import subprocess
import sys
import threading
from typing import Any

import msgspec

from xdeepserve.errors import ModelFormatError, RequestError
from xdeepserve.text.template_worker import RENDER_TIMEOUT_S, read_frame, write_frame

_GRACE_S = 25.0
"""On top of the child's own deadline: start of an interpreter on a busy machine."""


class _Reply(msgspec.Struct):
    text: str = ""
    error: str | None = None


class _WorkerDied(Exception):
    """The child was killed by its deadline or could not be reached."""


class ChatTemplate:
    """One model's chat template. Thread-safe; renders one conversation at a time.

    Owns a child process from first use until `close`.

    Args:
        source: Jinja source, untrusted.
        special_tokens: `bos_token` and the like, visible to the template.
        timeout_s: wall-clock limit of one rendering.
    """

    def __init__(
        self,
        source: str,
        *,
        special_tokens: dict[str, str] | None = None,
        timeout_s: float = RENDER_TIMEOUT_S,
    ) -> None:
        self._source = source
        self._special_tokens = special_tokens or {}
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def check(self) -> None:
        """Start the child and compile the template.

        Raises:
            ModelFormatError: it does not compile within its limits.
        """
        try:
            with self._lock:
                self._running_child()
        except _WorkerDied as exc:
            raise ModelFormatError(f"chat template of the model: {exc}") from exc

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Prompt text of a conversation; blocks, so call it off the event loop.

        Args:
            messages: JSON-like, each with `role` and `content`.
            add_generation_prompt: end with the opening of an assistant turn.
            variables: further names for the template; they cannot shadow the standard ones.

        Raises:
            RequestError: the template refused the messages, or took too long or too much memory.
        """
        context = {
            **(variables or {}),
            **self._special_tokens,
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with self._lock:
                reply = self._exchange(self._running_child(), {"variables": context})
        except _WorkerDied as exc:
            raise RequestError(f"chat template: {exc}", param="messages") from exc
        if reply.error is not None:
            raise RequestError(f"chat template: {reply.error}", param="messages")
        return reply.text

    def close(self) -> None:
        """End the child; idempotent. A later render would start a new one."""
        with self._lock:
            self._kill()

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _running_child(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._kill()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "xdeepserve.text.template_worker", str(self._timeout_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            reply = self._exchange(self._child, {"source": self._source})
            if reply.error is not None:
                self._kill()
                raise _WorkerDied(reply.error)
        return self._child

    def _exchange(self, child: subprocess.Popen[bytes], command: dict[str, Any]) -> _Reply:
        """One command and its reply; the child is gone if there is none."""
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            write_frame(child.stdin, msgspec.json.encode(command))
            poller = select.poll()
            poller.register(child.stdout, select.POLLIN)
            ready = poller.poll((self._timeout_s + _GRACE_S) * 1000)
            frame = read_frame(child.stdout) if ready else None
        except OSError:
            frame = None
        if frame is None:
            self._kill()
            raise _WorkerDied(f"did not finish within {self._timeout_s:g} s")
        return msgspec.json.decode(frame, type=_Reply)

    def _kill(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # unflushed bytes of a command that the child did not read
