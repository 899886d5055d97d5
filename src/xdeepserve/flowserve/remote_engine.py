"""RemoteEngine: the EngineClient of a DP group in another process. Lives on the gateway's loop.

    generate --- Submit ---> [socket] ---> DPServer
    TokenStream <--- _take <--- Events <--- one frame per step

A background task keeps the connection: when it breaks, or the group stays silent, all streams fail
with EngineDeadError and the task connects again, to the same process or to its successor.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path

from xdeepserve.control import ControlClient, to_local
from xdeepserve.errors import (
    CapacityError,
    ConfigError,
    ConnectionLost,
    DeadlineExceeded,
    EngineDeadError,
    ProtocolError,
    RequestError,
    XDeepServeError,
)
from xdeepserve.flowserve.dp_messages import (
    Abort,
    Attach,
    Attached,
    Events,
    FromGroup,
    Submit,
)
from xdeepserve.flowserve.load import NO_LOAD, counters_of, total_load
from xdeepserve.flowserve.token_stream import TokenStream
from xdeepserve.flowserve.validation import validate_request
from xdeepserve.messages import EngineInfo, GenerateRequest, LoadReport, num_blocks_needed

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTimes:
    """Deadlines of the connection to a DP group, in seconds.

    Attributes:
        connect_s: for one attempt to connect and attach.
        retry_s: pause between attempts.
        silence_s: a group that says nothing for so long is lost; several report intervals.
        abort_s: how long `close` waits for the end of aborted requests.
    """

    connect_s: float = 5.0
    retry_s: float = 0.05
    silence_s: float = 2.0
    abort_s: float = 1.0


_NUM_SILENCE_TICKS = 8
"""Silence is counted in ticks of our own loop, so that a pause of this process blames nobody."""


class RemoteEngine:
    """EngineClient over a group's control socket; made by `connect`."""

    def __init__(self, path: Path, *, times: LinkTimes = LinkTimes()) -> None:
        self.name = path.stem
        self._path = path
        self._times = times
        self._info: EngineInfo | None = None
        self._client: ControlClient | None = None
        self._streams: dict[str, weakref.ref[TokenStream]] = {}
        # KV blocks of each Submit that the latest report does not count yet, oldest first.
        self._unreported: deque[int] = deque()
        self._num_submitted = 0
        self._load = self._past_load = NO_LOAD
        self._is_group_alive = False
        self._num_events = 0
        self._is_closing = False
        self._attached = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop = asyncio.get_running_loop()
        self._link: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        timeout_s: float,
        times: LinkTimes = LinkTimes(),
    ) -> RemoteEngine:
        """Wait until the group serves its socket, and attach.

        Args:
            path: the group's socket; its name without suffix names the group.
            timeout_s: for the process to start, load its weights and accept.
            times: deadlines from then on.

        Raises:
            DeadlineExceeded: it did not come up in time.
        """
        engine = cls(path, times=times)
        engine._link = asyncio.create_task(engine._keep_link())
        try:
            async with asyncio.timeout(timeout_s):
                await engine._attached.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"{engine.name} did not start within {timeout_s} s") from None
        finally:
            if engine._info is None:
                await engine.close(drain_timeout_s=0.0)
        return engine

    # -- EngineClient ---------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """Fixed facts of the group."""
        assert self._info is not None, "connect() returns attached engines only"
        return self._info

    def generate(self, *, request: GenerateRequest) -> TokenStream:
        """Submit a request; see EngineClient.generate.

        Whether the group's queue is full is only known there: a CapacityError may also come from
        the stream, before its first output.
        """
        validate_request(request, self.info)
        if self._is_closing:
            raise CapacityError(f"the link to {self.name} is closing; send the request elsewhere")
        if request.request_id in self._streams:
            raise RequestError(f"request_id={request.request_id!r} is already in use")
        if self._client is None or not self._is_group_alive:
            raise EngineDeadError(f"{self.name} is not running")
        try:
            self._client.notify(Submit(request))
        except ConnectionLost as exc:
            raise EngineDeadError(f"{self.name} is gone: {exc.message}") from exc
        self._num_submitted += 1
        self._unreported.append(num_blocks_needed(request, self.info.block_size))
        stream = TokenStream(request.request_id, abort=self._abort_soon)
        self._streams[request.request_id] = weakref.ref(stream)
        self._idle.clear()
        return stream

    def _abort_soon(self, request_id: str) -> None:
        """Abort from wherever a forgotten stream happens to be collected, any thread included."""
        with suppress(RuntimeError):  # The event loop is closed, and the connection with it.
            self._loop.call_soon_threadsafe(self._post_abort, request_id)

    def _post_abort(self, request_id: str) -> None:
        if self._client is None or request_id not in self._streams:
            return
        try:
            self._client.notify(Abort(request_id))
        except ConnectionLost:
            logger.debug("%s is gone; nothing is left to abort", self.name)

    async def abort(self, *, request_id: str) -> None:
        """Ask for a request's end; see EngineClient.abort."""
        self._post_abort(request_id)

    def load(self) -> LoadReport:
        """The latest report, with what was submitted since counted as waiting. Never blocks.

        Counters go on when the group is restarted.
        """
        since = LoadReport(
            num_running=0,
            num_waiting=len(self._unreported),
            num_free_blocks=0,
            num_total_blocks=0,
            num_reserved_blocks=sum(self._unreported),
        )
        return total_load((self._past_load, self._load, since))

    def is_alive(self) -> bool:
        """Whether the group is connected, not silent, and its step loop runs."""
        return self._client is not None and self._is_group_alive and not self._is_closing

    async def close(self, *, drain_timeout_s: float) -> None:
        """Refuse new requests, drain, abort the rest, disconnect; the group itself lives on."""
        self._is_closing = True
        if not await self._wait_idle(drain_timeout_s):
            for request_id in list(self._streams):
                self._post_abort(request_id)
            await self._wait_idle(self._times.abort_s)
        link, self._link = self._link, None
        if link is not None:
            link.cancel()
            await asyncio.gather(link, return_exceptions=True)

    async def _wait_idle(self, timeout_s: float) -> bool:
        if self._idle.is_set():
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # -- the link -------------------------------------------------------------------------------

    async def _keep_link(self) -> None:
        """Connect, serve the connection until it is lost, and again."""
        while True:
            try:
                await self._serve_link()
            except (ConnectionLost, DeadlineExceeded) as exc:
                logger.debug("%s: %s", self.name, exc.message)
            except XDeepServeError as exc:
                logger.error("%s: the connection is of no use: %s", self.name, exc.message)
            except Exception:  # loop top: a bug must not cut the group off for good
                logger.exception("%s: the connection failed", self.name)
            await asyncio.sleep(self._times.retry_s)

    async def _serve_link(self) -> None:
        client = await ControlClient.connect(
            self._path, replies=FromGroup, timeout_s=self._times.connect_s
        )
        watch = asyncio.create_task(self._watch_silence(client))
        try:
            async with aclosing(client.stream(Attach(), item_timeout_s=None)) as messages:
                async for message in messages:
                    self._on_message(message, client)
        except XDeepServeError as exc:
            self._detach(exc.message)
            raise
        finally:
            self._detach("the gateway disconnected")
            watch.cancel()
            await client.close()

    def _on_message(self, message: FromGroup, client: ControlClient) -> None:
        self._num_events += 1
        match message:
            case Attached(info):
                self._attach(client, info)
            case Events():
                self._take(message)
            case _:
                raise ProtocolError(f"{type(message).__name__} among the events")

    async def _watch_silence(self, client: ControlClient) -> None:
        num_silent = seen = 0
        while num_silent < _NUM_SILENCE_TICKS:
            await asyncio.sleep(self._times.silence_s / _NUM_SILENCE_TICKS)
            num_silent = num_silent + 1 if self._num_events == seen else 0
            seen = self._num_events
        logger.warning("%s said nothing for %.1f s", self.name, self._times.silence_s)
        await client.close()

    def _attach(self, client: ControlClient, info: EngineInfo) -> None:
        if self._info is not None and info != self._info:
            raise ConfigError(f"{self.name} came back as {info}, it was {self._info}")
        self._info = info
        self._client = client
        self._is_group_alive = True
        self._num_submitted = 0
        self._load = LoadReport(
            num_running=0,
            num_waiting=0,
            num_free_blocks=info.num_kv_blocks,
            num_total_blocks=info.num_kv_blocks,
        )
        self._attached.set()
        logger.info("%s is connected (process %d)", self.name, client.peer.pid)

    def _detach(self, reason: str) -> None:
        """Fail all streams; nothing of the old connection is left. Idempotent."""
        if self._client is None:
            return
        is_meant = self._is_closing and not self._streams
        level = logging.INFO if is_meant else logging.WARNING
        logger.log(level, "%s is lost with %d requests: %s", self.name, len(self._streams), reason)
        self._client = None
        self._is_group_alive = False
        self._unreported.clear()
        self._past_load = total_load((self._past_load, counters_of(self._load)))
        self._load = NO_LOAD
        for reference in self._streams.values():
            if (stream := reference()) is not None:
                stream.fail(EngineDeadError(f"{self.name} is gone: {reason}"))
        self._streams.clear()
        self._idle.set()

    def _take(self, events: Events) -> None:
        self._is_group_alive = events.is_alive
        self._load = events.load
        while self._num_submitted - len(self._unreported) < events.num_received:
            self._unreported.popleft()
        for output in events.outputs:
            is_last = output.finish_reason is not None
            if (stream := self._find_stream(output.request_id, is_last=is_last)) is not None:
                stream.push(output)
        for refused in events.refused:
            if (stream := self._find_stream(refused.request_id, is_last=True)) is not None:
                stream.fail(to_local(refused.error))

    def _find_stream(self, request_id: str, *, is_last: bool) -> TokenStream | None:
        reference = self._streams.get(request_id)
        if is_last and reference is not None:
            del self._streams[request_id]
            if not self._streams:
                self._idle.set()
        return None if reference is None else reference()
