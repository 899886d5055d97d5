"""Errors -> HTTP status and OpenAI error body. The only place that knows the mapping.

Errors raised on purpose carry their own status, type, code and text. Everything else is a bug of
ours: it is logged with the request id and the client sees a generic 500.
"""

from __future__ import annotations

import logging

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from xdeepserve.errors import CapacityError, RequestError, XDeepServeError
from xdeepserve.maas.schema import ErrorBody, ErrorDetail

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
STATUS_CLIENT_GONE = 499


class RequestTimeout(RequestError):
    """The client did not send its body in time (408)."""

    status = 408


class DrainingError(CapacityError):
    """The server is shutting down (503)."""


class ClientGone(Exception):
    """The client closed the connection; nobody will read an answer."""


def error_body(error: XDeepServeError) -> ErrorBody:
    """The OpenAI error object of an error raised on purpose."""
    return ErrorBody(ErrorDetail(error.message, error.error_type, error.param, error.code))


def internal_error(request_id: str) -> ErrorBody:
    """What a client sees of a bug of ours: an id to report, nothing of the inside."""
    message = f"The server had an error while processing the request (request id {request_id})."
    return ErrorBody(ErrorDetail(message, "server_error", None, "internal_error"))


def unavailable(error: XDeepServeError, request_id: str) -> ErrorBody:
    """What a client sees of trouble inside that is not its business."""
    message = f"The server cannot answer now; try again later (request id {request_id})."
    return ErrorBody(ErrorDetail(message, error.error_type, None, error.code))


def _reply(status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> Response:
    content = msgspec.json.encode(body)
    return Response(content, status, headers, media_type="application/json")


def on_error(request: Request, exc: Exception) -> Response:
    """Answer an XDeepServeError."""
    assert isinstance(exc, XDeepServeError)
    headers = {"retry-after": str(RETRY_AFTER_S)} if exc.status == 503 else {}
    if exc.code == "insufficient_quota":
        headers["x-should-retry"] = "false"  # the official SDK would try again
    if exc.status == 401:
        headers["www-authenticate"] = "Bearer"
    if exc.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not worth reading
    if not exc.is_public:
        request_id = str(request.scope.get("request_id", "unknown"))
        logger.error("request id %s: %s", request_id, exc.message)
        return _reply(exc.status, unavailable(exc, request_id), headers)
    return _reply(exc.status, error_body(exc), headers)


def on_http_exception(request: Request, exc: Exception) -> Response:
    """Answer what the router raises: 404 and 405."""
    assert isinstance(exc, HTTPException)
    what = {
        404: f"there is no {request.url.path} here",
        405: f"{request.method} is not allowed for {request.url.path}",
    }.get(exc.status_code, exc.detail)
    detail = ErrorDetail(what, "invalid_request_error", None, None)
    return _reply(exc.status_code, ErrorBody(detail), dict(exc.headers or {}))


def on_client_gone(request: Request, exc: Exception) -> Response:
    """Nobody listens; the status only shows in an access log."""
    return Response(status_code=STATUS_CLIENT_GONE)


def on_bug(request: Request, exc: Exception) -> Response:
    """Answer anything else; the traceback goes to the log."""
    request_id = str(request.scope.get("request_id", "unknown"))
    logger.error("unhandled error, request id %s", request_id, exc_info=exc)
    return _reply(500, internal_error(request_id))
