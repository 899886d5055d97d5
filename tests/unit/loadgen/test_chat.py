"""Terminal chat: history, commands, stopping an answer, piped stdin, untrusted output."""

from __future__ import annotations

import argparse
import asyncio
import io
import signal
from collections.abc import Iterator

import pytest

from tests.unit.loadgen.fake_server import (
    FakeRequest,
    Reply,
    answer,
    chat_chunk,
    served,
    usage_chunk,
)
from xdeepserve.loadgen.chat import (
    AnswerStats,
    ChatSession,
    ask_once,
    printable,
    run_session,
)
from xdeepserve.loadgen.cli import add_chat_arguments, run_chat
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ConnectFailed, HttpStatusError
from xdeepserve.loadgen.openai_stream import PromptTokensDetails, UsageReport
from xdeepserve.telemetry import RequestTimeline


def converse(url: str, lines: list[str | None]) -> tuple[str, ChatSession, int]:
    """Run a session over `lines`: what was written, the session, failed questions."""
    written: list[str] = []
    client = HttpClient(url)
    session = ChatSession(client, "m", {})
    with asyncio.Runner() as runner:
        num_failed = run_session(session, iter(lines), runner, write=written.append)
        runner.run(client.close())
    return "".join(written), session, num_failed


def piped(monkeypatch: pytest.MonkeyPatch, text: str, *flags: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    parser = argparse.ArgumentParser()
    add_chat_arguments(parser)
    return run_chat(parser.parse_args(flags))


def test_answer_streams_and_ends_in_a_line_of_numbers() -> None:
    with served() as server:
        text, _, num_failed = converse(server.url, ["hello"])
    first, second = text.splitlines()
    assert first == "t0 t1 t2 "
    assert second.startswith("[TTFT ")
    assert "5 prompt tokens, 3 output tokens, ended by length]" in second
    assert num_failed == 0


def test_history_grows_and_reset_forgets_it() -> None:
    with served() as server:
        converse(server.url, ["one", "two", "/reset", "three"])
    sent = [[m["content"] for m in request.json["messages"]] for request in server.requests]
    assert sent == [["one"], ["one", "t0 t1 t2 ", "two"], ["three"]]


def test_system_prompt_is_set_and_removed() -> None:
    with served() as server:
        converse(server.url, ["/system be brief", "one", "/reset", "/system", "two"])
    sent = [request.json["messages"] for request in server.requests]
    assert sent[0][0] == {"role": "system", "content": "be brief"}
    assert [message["role"] for message in sent[1]] == ["user"]


def test_quit_ends_and_blank_lines_and_unknown_commands_ask_nothing() -> None:
    with served() as server:
        text, _, _ = converse(server.url, ["", "  ", "/nonsense", None, "/quit", "unseen"])
    assert server.requests == []
    assert "unknown command /nonsense" in text


def test_failed_question_is_reported_and_not_kept() -> None:
    async def refuse(request: FakeRequest, reply: Reply) -> None:
        await reply.send_json({"error": {"message": "too long"}}, status=400)

    with served(refuse) as server:
        text, session, num_failed = converse(server.url, ["hello"])
    assert "error: HTTP 400: too long" in text
    assert (session.history, num_failed) == ([], 1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal; what a shell starts in the background ignores it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    async def endless_first(request: FakeRequest, reply: Reply) -> None:
        if len(server.requests) > 1:
            await answer(request, reply)
            return
        await reply.start_stream()
        while True:
            await reply.event(chat_chunk("again "))

    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if text == "again " and written.count(text) == 1:
            signal.raise_signal(signal.SIGINT)

    with served(endless_first) as server, asyncio.Runner() as runner:
        client = HttpClient(server.url)
        session = ChatSession(client, "m", {})
        run_session(session, iter(["first", "second"]), runner, write=write)
        runner.run(client.close())
        assert server.disconnected.is_set()
    text = "".join(written)
    assert "(stopped; not kept in the conversation)" in text
    assert "t0 t1 t2" in text
    assert [message["content"] for message in session.history] == ["second", "t0 t1 t2 "]


def test_piped_stdin_answers_each_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with served() as server:
        flags = ["--url", server.url, "--max-tokens", "2", "--temperature", "0"]
        assert piped(monkeypatch, "one\ntwo\n", *flags) == 0
    assert capsys.readouterr().out.count("t0 t1 \n[TTFT") == 2
    body = server.requests[-1].json
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("fake-model", 2, 0)
    assert "seed" not in body


def test_piped_stdin_fails_when_a_question_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(request: FakeRequest, reply: Reply) -> None:
        await reply.send_json({"error": {"message": "no"}}, status=500)

    with served(refuse) as server:
        assert piped(monkeypatch, "one\n", "--url", server.url, "--model", "m") == 1


def test_unreachable_server_is_one_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as server:
        url = server.url
    with pytest.raises(ConnectFailed):
        piped(monkeypatch, "one\n", "--url", url)


def test_ask_once_prints_the_answer_and_returns_its_numbers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with served() as server:
        stats = ask_once(server.url, "m", "why?", options={"max_tokens": 4})
    assert stats.text == "t0 t1 t2 t3 "
    assert stats.usage is not None
    assert stats.usage.completion_tokens == 4
    assert stats.timeline.ttft_s is not None
    assert capsys.readouterr().out.startswith("t0 t1 t2 t3 \n[TTFT ")


def test_ask_once_raises_the_servers_error() -> None:
    async def refuse(request: FakeRequest, reply: Reply) -> None:
        await reply.send_json({"error": {"message": "no such model"}}, status=404)

    with served(refuse) as server, pytest.raises(HttpStatusError, match="no such model"):
        ask_once(server.url, "m", "why?")


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    async def hostile(request: FakeRequest, reply: Reply) -> None:
        await reply.start_stream()
        await reply.event(chat_chunk("a\x1b[2Jb\x07\tc\r\nd\x9b"))
        await reply.event(usage_chunk(1, 1))
        await reply.end_stream()

    with served(hostile) as server:
        ask_once(server.url, "m", "?")
    assert capsys.readouterr().out.startswith("a[2Jb\tc\nd\n[")


def test_printable_keeps_text_of_any_script() -> None:
    assert printable("Zoë 中文 🎉\n\t") == "Zoë 中文 🎉\n\t"


def summaries() -> Iterator[tuple[AnswerStats, str]]:
    full = AnswerStats(RequestTimeline(1.0, 1.25, 2.25, 11), finish_reason="stop")
    full.usage = UsageReport(9, 11, PromptTokensDetails(4))
    yield (
        full,
        "[TTFT 250.0 ms, TPOT 100.0 ms (10 tok/s), 9 prompt tokens (4 cached), 11 output tokens]",
    )
    bare = AnswerStats(RequestTimeline(1.0))
    yield bare, "[TTFT -, TPOT -, 0 chunks]"


@pytest.mark.parametrize(("stats", "line"), list(summaries()))
def test_summary_line(stats: AnswerStats, line: str) -> None:
    assert stats.summary() == line
