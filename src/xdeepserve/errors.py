"""The exception tree of the whole project; imports nothing.

A message says what was wrong, the value, the limit and what to change. Each class carries the
OpenAI error `type`/`code` and the HTTP status it maps to, so that the edge needs one handler.
"""

from __future__ import annotations


class XDeepServeError(Exception):
    """Root of all errors raised on purpose.

    Attributes:
        status: HTTP status the error maps to at the edge.
        error_type: OpenAI `error.type`.
        code: OpenAI `error.code`, or None.
        param: name of the request field at fault, or None.
        is_public: whether clients of the service may read the message.
    """

    status = 500
    error_type = "server_error"
    is_public = True

    def __init__(self, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param


class RequestError(XDeepServeError):
    """The request itself is wrong (400); `code` and `param` say where."""

    status = 400
    error_type = "invalid_request_error"


class NotFoundError(RequestError):
    """The named model or resource does not exist (404)."""

    status = 404


class PayloadTooLarge(RequestError):
    """The body exceeds the limit (413)."""

    status = 413


class CapacityError(XDeepServeError):
    """A bounded queue or pool is full (503); the client should retry after a while."""

    status = 503
    error_type = "overloaded_error"


class DeadlineExceeded(XDeepServeError):
    """A wait reached its deadline (504)."""

    status = 504
    error_type = "timeout_error"


class EngineDeadError(XDeepServeError):
    """The engine loop ended; nothing more will be computed (503)."""

    status = 503


class ConnectionLost(XDeepServeError):
    """The peer process closed the connection, died or does not read what it is sent (503)."""

    status = 503


class ProtocolError(XDeepServeError):
    """A peer process sent bytes that are no valid message; the connection is closed."""


class ConfigError(XDeepServeError):
    """A flag, file or environment variable is wrong; the process exits with status 2."""


class ModelFormatError(ConfigError):
    """A model file is damaged, truncated, unsupported or lies about its sizes."""


class IntegrityError(XDeepServeError):
    """A conservation law is broken: a bug of ours. Dump the state and stop."""


class XcclError(XDeepServeError):
    """Communication between workers failed (503).

    Attributes:
        ranks: the ranks concerned; empty where none is to blame.
    """

    status = 503

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class PeerLost(XcclError):
    """Ranks that owe an answer are dead, frozen or replaced; `ranks` lists them."""


class XcclTimeout(XcclError):
    """A wait reached its deadline (504); `ranks` lists those that still owe an answer."""

    status = 504


class SegmentError(XcclError):
    """A shared segment cannot be created, or is not what its blob says."""
