"""Watched streams: completions that run side by side while something is done to their server.

    requests --> WatchedLoad: one client each --> [ StreamRecord: text, arrivals, error ]

What is compared afterwards: the texts, and the longest silence that a client saw.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from xdeepserve.clock import SYSTEM_CLOCK
from xdeepserve.errors import DeadlineExceeded
from xdeepserve.loadgen.http_client import HttpClient
from xdeepserve.loadgen.http_connection import ClientError, Timeouts
from xdeepserve.loadgen.openai_stream import Chunk, stream_chunks

SILENCE_TIMEOUT_S: Final = 60.0
"""A stream that is silent for longer counts as hung."""

BEGIN_TIMEOUT_S: Final = 120.0
COMPLETIONS: Final = "/v1/completions"


@dataclass(frozen=True, slots=True)
class WatchedRequest:
    """A completion whose text is a function of these fields: greedy, or sampled from a seed."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int

    def body(self, model: str) -> dict[str, Any]:
        """The JSON body of the request."""
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def watched_requests(count: int, max_tokens: int) -> list[WatchedRequest]:
    """`count` different requests, greedy and sampled in turn."""
    return [
        WatchedRequest(
            prompt=f"Story number {idx}: once upon a time",
            max_tokens=max_tokens,
            temperature=0.8 if idx % 2 else 0.0,
            seed=idx,
        )
        for idx in range(count)
    ]


@dataclass(slots=True)
class StreamRecord:
    """One answer as its client saw it.

    Attributes:
        text: all of it.
        num_tokens: as the server counts them.
        arrivals_s: monotonic time of each chunk with output.
        error: why the answer is not whole.
        is_done: nothing will be added.
    """

    text: str = ""
    num_tokens: int = 0
    arrivals_s: list[float] = field(default_factory=list)
    error: str | None = None
    is_done: bool = False

    def add(self, chunk: Chunk, now_s: float) -> None:
        """Take note of a chunk."""
        if chunk.usage is not None:
            self.num_tokens = chunk.usage.completion_tokens
        self.text += "".join(choice.new_text for choice in chunk.choices)
        if any(choice.has_token for choice in chunk.choices):
            self.arrivals_s.append(now_s)

    def longest_gap_s(self, since_s: float) -> float:
        """Longest time between two chunks of which the second came after `since_s`; 0 = none."""
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return max((after - before for before, after in pairs if after >= since_s), default=0.0)


class WatchedLoad:
    """Runs requests at the same time, each by a client of its own; an async context manager.

    Attributes:
        records: one list of answers per client, in the order of the requests.
    """

    def __init__(
        self, url: str, model: str, requests: Sequence[WatchedRequest], *, repeats: bool = False
    ) -> None:
        """Prepare; entering the context starts the clients.

        Args:
            url: of the server.
            model: its name there.
            requests: one per client.
            repeats: each client sends its request again and again, until `finish`.
        """
        self.records: list[list[StreamRecord]] = [[] for _ in requests]
        self._client = HttpClient(url, timeouts=Timeouts(between_bytes_s=SILENCE_TIMEOUT_S))
        self._bodies = [request.body(model) for request in requests]
        self._is_finishing = not repeats
        self._progress = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> WatchedLoad:
        for body, records in zip(self._bodies, self.records, strict=True):
            self._tasks.append(asyncio.create_task(self._run(body, records)))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.close()

    async def until_all_have(self, num_chunks: int) -> float:
        """Wait until each client has so many chunks of its first answer, or its end.

        Returns:
            The monotonic time.

        Raises:
            DeadlineExceeded: not within BEGIN_TIMEOUT_S.
        """
        try:
            async with asyncio.timeout(BEGIN_TIMEOUT_S):
                while not all(_has_begun(records, num_chunks) for records in self.records):
                    self._progress.clear()
                    await self._progress.wait()
        except TimeoutError:
            raise DeadlineExceeded(
                f"not every stream has {num_chunks} chunks after {BEGIN_TIMEOUT_S:g} s"
            ) from None
        return SYSTEM_CLOCK.monotonic()

    async def finish(self) -> list[list[StreamRecord]]:
        """Let each client end its present answer; the records, then complete."""
        self._is_finishing = True
        await asyncio.gather(*self._tasks)
        return self.records

    async def _run(self, body: dict[str, Any], records: list[StreamRecord]) -> None:
        while not records or not (self._is_finishing or records[-1].error):
            record = StreamRecord()
            records.append(record)
            try:
                await self._consume(body, record)
            except ClientError as exc:
                record.error = exc.message
            record.is_done = True
            self._progress.set()

    async def _consume(self, body: dict[str, Any], record: StreamRecord) -> None:
        stream = stream_chunks(self._client, COMPLETIONS, body)
        async with contextlib.aclosing(stream) as batches:
            async for batch in batches:
                now_s = SYSTEM_CLOCK.monotonic()
                for chunk in batch:
                    record.add(chunk, now_s)
                self._progress.set()


def _has_begun(records: Sequence[StreamRecord], num_chunks: int) -> bool:
    if not records:
        return False
    return records[0].is_done or len(records[0].arrivals_s) >= num_chunks


def longest_gap_s(records: Iterable[Sequence[StreamRecord]], since_s: float) -> float:
    """The longest silence within an answer that any client saw; see StreamRecord.longest_gap_s."""
    gaps = (record.longest_gap_s(since_s) for answers in records for record in answers)
    return max(gaps, default=0.0)
