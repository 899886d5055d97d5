"""Runs the app under uvicorn: socket, readiness line, header limit, and the drain on a signal.

First SIGTERM or SIGINT: /ready and new requests answer 503 while running generations finish, at
most `drain_timeout_s`; then the rest is aborted and the server ends. Second signal: abort now.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from xdeepserve import garbage
from xdeepserve.config import GatewayConfig
from xdeepserve.errors import ConfigError
from xdeepserve.maas.gateway import Gateway

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
MAX_HEADER_BYTES = 64 << 10
MAX_CONNECTIONS = 4096
KEEP_ALIVE_S = 65
"""Longer than the idle timeout of common HTTP clients and balancers, so that they close first."""
HEAD_TIMEOUT_S = 30.0
"""For a client to send its request line and headers, from the connection or their first byte."""
COLLECT_AFTER_TICKS = 10
"""Ticks, of a tenth of a second, without a request before garbage is collected."""
CLOSE_TIMEOUT_S = 3
"""After the drain: for aborted streams to tell their clients."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """uvicorn's httptools protocol with limits on size and time of request line and headers."""

    head_timeout_s = HEAD_TIMEOUT_S
    _head_bytes = 0
    _is_in_head = False
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        self._is_in_head = True
        self._start_head_timer()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_head_timer()
        super().on_headers_complete()

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.head_timeout_s, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                self.send_400_response(f"Request headers exceed {MAX_HEADER_BYTES} bytes.")


class DrainingServer(uvicorn.Server):
    """uvicorn with the two-stage stop described above.

    Args:
        on_ready: called with the URL once connections are accepted.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        gateway: Gateway,
        drain_timeout_s: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._drain_timeout_s = drain_timeout_s
        self._on_ready = on_ready
        self._num_signals = 0
        self._num_idle_ticks = 0
        self._deadline_s: float | None = None

    def stop(self) -> None:
        """Begin the drain; called again, end it now. Safe in a signal handler."""
        self._num_signals += 1

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; True ends the accept loop and begins uvicorn's shutdown."""
        is_over = await super().on_tick(counter)
        self._collect_when_idle()
        if self._num_signals == 0:
            return is_over
        now_s = asyncio.get_running_loop().time()
        if self._deadline_s is None:
            self._gateway.begin_drain()
            self._deadline_s = now_s + self._drain_timeout_s
            self._announce_drain()
        if is_over or self._num_signals > 1 or now_s >= self._deadline_s:
            self._gateway.abort_running()
            return True
        return not self.server_state.tasks

    def _collect_when_idle(self) -> None:
        """Once in each idle spell that lasts."""
        self._num_idle_ticks = 0 if self._gateway.num_running else self._num_idle_ticks + 1
        if self._num_idle_ticks == COLLECT_AFTER_TICKS:
            garbage.collect_idle()

    def _announce_drain(self) -> None:
        """Whoever pressed Ctrl-C should know what is waited for, and how not to wait."""
        if num_requests := self._gateway.num_running:
            logger.info(
                "draining %d %s, at most %g s; Ctrl-C again to stop now",
                num_requests,
                "request" if num_requests == 1 else "requests",
                self._drain_timeout_s,
            )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Route the signals to `stop`; unlike uvicorn's own, do not raise them again at the end."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.stop()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(config: GatewayConfig) -> socket.socket:
    """Listening socket of the configured address.

    Raises:
        ConfigError: the port is in use or the address is not ours.
    """
    return _listen(config.host, config.port, "--host/--port")


def bind_admin(config: GatewayConfig) -> socket.socket:
    """Listening socket of the admin API; errors as `bind`."""
    return _listen(config.admin_host, config.admin_port, "--admin-host/--admin-port")


def _listen(host: str, port: int, flags: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; choose another {flags}"
        ) from exc


def url_of(listener: socket.socket) -> str:
    """Base URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(
    app: Starlette,
    config: GatewayConfig,
    *,
    access_log: bool = False,
    on_ready: Callable[[], None],
) -> DrainingServer:
    """A server for the app of `create_app`; `serve(sockets=[...])` runs it."""
    settings = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=access_log,
        server_header=False,
        proxy_headers=False,  # anybody could say to be somewhere else
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
    )
    return DrainingServer(
        settings,
        gateway=app.state.gateway,
        drain_timeout_s=config.drain_timeout_s,
        on_ready=on_ready,
    )


def run_server(
    app: Starlette,
    config: GatewayConfig,
    *,
    listener: socket.socket | None = None,
    access_log: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve until drained after a signal; returns normally then. Call on the main thread.

    Args:
        app: from `create_app`; its lifespan closes the engine at the end.
        listener: from `bind`, to claim the port before slow work; by default bound here.
        on_ready: called with the base URL when connections are accepted; by default a line
            `xdeepserve: serving MODEL on URL` goes to stdout.

    Raises:
        ConfigError: the address cannot be bound.
    """
    bound = bind(config) if listener is None else listener
    url = url_of(bound)

    def announce() -> None:
        if on_ready is not None:
            on_ready(url)
        else:
            name = app.state.gateway.model_names[0]
            print(f"xdeepserve: serving {name} on {url}", flush=True)  # noqa: T201

    server = make_server(app, config, access_log=access_log, on_ready=announce)
    with bound:
        server.run(sockets=[bound])
