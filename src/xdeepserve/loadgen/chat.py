"""Terminal chat against a server, and one question asked and answered (`demo`).

Prints the answer as it streams, then TTFT, TPOT and token counts as the client saw them.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from xdeepserve.clock import SYSTEM_CLOCK, Clock
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError
from xdeepserve.loadgen.openai_stream import Chunk, UsageReport, first_model, stream_chunks
from xdeepserve.loadgen.workload import PATHS
from xdeepserve.telemetry import RequestTimeline

HELP: Final = """\
/system TEXT  set the system prompt (without TEXT: remove it)
/reset        forget the conversation
/quit         leave (also Ctrl-D)
Ctrl-C        stop the running answer"""

Message = dict[str, str]
Write = Callable[[str], None]

# Model output is untrusted: of the control characters only tab and newline reach the terminal.
_CONTROL: Final = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


@dataclass(slots=True)
class AnswerStats:
    """One answer: its text, the times the client saw, and the server's token counts."""

    timeline: RequestTimeline
    text: str = ""
    finish_reason: str | None = None
    usage: UsageReport | None = None

    def summary(self) -> str:
        """One line: TTFT, TPOT, tokens. Without usage, chunks stand for tokens."""
        tpot_s = self.timeline.tpot_s
        parts = [
            f"TTFT {_milliseconds(self.timeline.ttft_s)}",
            f"TPOT {_milliseconds(tpot_s)}" + (f" ({1 / tpot_s:.0f} tok/s)" if tpot_s else ""),
        ]
        if self.usage is not None:
            cached = f" ({self.usage.cached_tokens} cached)" if self.usage.cached_tokens else ""
            parts.append(f"{self.usage.prompt_tokens} prompt tokens{cached}")
            parts.append(f"{self.usage.completion_tokens} output tokens")
        else:
            parts.append(f"{self.timeline.num_output_tokens} chunks")
        if self.finish_reason not in (None, "stop"):
            parts.append(f"ended by {self.finish_reason}")
        return "[" + ", ".join(parts) + "]"


def _milliseconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f} ms"


def printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal."""
    return text.translate(_CONTROL)


async def stream_answer(
    client: HttpClient, body: dict[str, Any], *, write: Write, clock: Clock = SYSTEM_CLOCK
) -> AnswerStats:
    """Post a chat request and hand its text to `write` as it arrives.

    Cancelling the call closes the connection, which aborts the answer on the server.

    Raises:
        ClientError: the server cannot be reached or reports an error.
    """
    stats = AnswerStats(RequestTimeline(clock.monotonic()))
    async with contextlib.aclosing(stream_chunks(client, PATHS["chat"], body)) as batches:
        async for batch in batches:
            now = clock.monotonic()
            for chunk in batch:
                _take(stats, chunk, now, write)
    if stats.usage is not None:
        stats.timeline.num_output_tokens = stats.usage.completion_tokens
    return stats


def _take(stats: AnswerStats, chunk: Chunk, now_s: float, write: Write) -> None:
    stats.usage = chunk.usage or stats.usage
    for choice in chunk.choices:
        if choice.has_token:
            stats.timeline.on_tokens(now_s=now_s, count=1)
            stats.text += choice.new_text
            write(printable(choice.new_text))
        stats.finish_reason = choice.finish_reason or stats.finish_reason


def chat_body(model: str, messages: list[Message], options: dict[str, Any]) -> dict[str, Any]:
    """A streaming chat request with usage."""
    body: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
    return body | {"stream_options": {"include_usage": True}} | options


def _write_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def ask_once(
    url: str,
    model: str,
    question: str,
    *,
    api_key: str | None = None,
    options: dict[str, Any] | None = None,
) -> AnswerStats:
    """Ask one question; print the streamed answer and a line with TTFT, TPOT and token counts.

    Raises:
        ClientError: the server cannot be reached or reports an error.
    """

    async def ask() -> AnswerStats:
        messages = [{"role": "user", "content": question}]
        body = chat_body(model, messages, options or {})
        async with HttpClient(url, api_key=api_key) as client:
            return await stream_answer(client, body, write=_write_stdout)

    stats = asyncio.run(ask())
    _write_stdout("\n" + stats.summary() + "\n")
    return stats


@dataclass(slots=True)
class ChatSession:
    """The conversation: what was said, and the system prompt in front of it."""

    client: HttpClient
    model: str
    options: dict[str, Any]
    system: str = ""
    history: list[Message] = field(default_factory=list)

    async def ask(self, question: str, *, write: Write) -> AnswerStats:
        """Stream the answer; question and answer join the history only when it is complete."""
        asked = [*self.history, {"role": "user", "content": question}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        body = chat_body(self.model, system + asked, self.options)
        stats = await stream_answer(self.client, body, write=write)
        self.history = [*asked, {"role": "assistant", "content": stats.text}]
        return stats

    def command(self, line: str) -> str:
        """Carry out a slash command other than /quit; returns what to tell the user."""
        name, _, argument = line.partition(" ")
        match name:
            case "/reset":
                self.history = []
                return "(conversation forgotten)"
            case "/system":
                self.system = argument.strip()
                return "(system prompt set)" if self.system else "(no system prompt)"
            case "/help":
                return HELP
            case _:
                return f"(unknown command {name})\n{HELP}"


def read_lines(*, is_terminal: bool) -> Iterator[str | None]:
    """Lines of stdin; on a terminal with a prompt and editing. None stands for Ctrl-C."""
    if not is_terminal:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            yield None


def run_session(
    session: ChatSession, lines: Iterator[str | None], runner: asyncio.Runner, *, write: Write
) -> int:
    """Answer every line until /quit or the end.

    Returns:
        The number of questions that failed.
    """
    num_failed = 0
    for raw in lines:
        line = "" if raw is None else raw.strip()
        if raw is None:
            write("\n(type /quit to leave)\n")
        elif line in ("/quit", "/exit"):
            break
        elif line.startswith("/"):
            write(session.command(line) + "\n")
        elif line:
            num_failed += not _answer(session, line, runner, write=write)
    return num_failed


def _answer(session: ChatSession, question: str, runner: asyncio.Runner, *, write: Write) -> bool:
    try:
        stats = runner.run(session.ask(question, write=write))
    except KeyboardInterrupt:
        write("\n(stopped; not kept in the conversation)\n")
    except ClientError as exc:
        write(f"\nerror: {exc.message}\n")
        return False
    else:
        write("\n" + stats.summary() + "\n")
    return True


def chat(
    url: str,
    model: str | None,
    *,
    api_key: str | None = None,
    system: str = "",
    options: dict[str, Any] | None = None,
) -> int:
    """Chat on stdin and stdout until the user leaves; returns how many questions failed.

    Raises:
        ClientError: the server cannot be reached at the start.
    """
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # odd bytes are no reason to end a conversation
    is_terminal = sys.stdin.isatty()
    client = HttpClient(url, api_key=api_key)
    with asyncio.Runner() as runner:
        try:
            served = runner.run(first_model(client)) if model is None else model
            if is_terminal:
                _write_stdout(f"{served} at {client.origin}; /help for commands\n")
            session = ChatSession(client, served, options or {}, system)
            lines = read_lines(is_terminal=is_terminal)
            return run_session(session, lines, runner, write=_write_stdout)
        finally:
            runner.run(client.close())
