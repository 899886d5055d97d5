"""Envelopes: what a frame can be, and how errors cross a process border.

client                          server
  | Call(id, body) ------------->  | one handler task per call
  | <------ Reply(id, body, last)  | once, or a stream whose final reply says so
  | <---------- Failure(id, error) | instead of the last reply
  | Cancel(id) ----------------->  | the caller lost interest: the task is cancelled
  | Notice(body) --------------->  | handled in order of arrival, never answered
  | Ping(nonce) ---------------->  | answered by the reading loop itself, in Pong(nonce)
"""

from __future__ import annotations

from typing import Final

import msgspec

from xdeepserve import errors


class RemoteError(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A typed error on its way to another process."""

    kind: str
    message: str
    code: str | None = None
    param: str | None = None


class Call(msgspec.Struct, frozen=True, tag="call", array_like=True, gc=False):
    """Start of an exchange; `call_id` is the client's and unique on the connection."""

    call_id: int
    body: msgspec.Raw


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True, gc=False):
    """End a call early; no further reply is wanted."""

    call_id: int


class Notice(msgspec.Struct, frozen=True, tag="notice", array_like=True, gc=False):
    """A message without an answer."""

    body: msgspec.Raw


class Ping(msgspec.Struct, frozen=True, tag="ping", array_like=True, gc=False):
    """Is your event loop running?"""

    nonce: int


class Pong(msgspec.Struct, frozen=True, tag="pong", array_like=True, gc=False):
    """It is."""

    nonce: int


class Reply(msgspec.Struct, frozen=True, tag="reply", array_like=True, gc=False):
    """The answer, or one message of an answer that is a stream."""

    call_id: int
    body: msgspec.Raw


class End(msgspec.Struct, frozen=True, tag="end", array_like=True, gc=False):
    """The stream is complete."""

    call_id: int


class Failure(msgspec.Struct, frozen=True, tag="failure", array_like=True, gc=False):
    """The call failed; nothing more comes."""

    call_id: int
    error: RemoteError


Envelope = Call | Cancel | Notice | Ping | Pong | Reply | End | Failure

_KINDS: Final[dict[str, type[errors.XDeepServeError]]] = {
    kind.__name__: kind
    for kind in (
        errors.XDeepServeError,
        errors.RequestError,
        errors.NotFoundError,
        errors.PayloadTooLarge,
        errors.CapacityError,
        errors.DeadlineExceeded,
        errors.EngineDeadError,
        errors.ConnectionLost,
        errors.ProtocolError,
        errors.ConfigError,
        errors.ModelFormatError,
        errors.IntegrityError,
    )
}


def to_remote(error: BaseException) -> RemoteError:
    """An error as a message; of an error that is not ours only the type is told."""
    if isinstance(error, errors.XDeepServeError):
        return RemoteError(type(error).__name__, error.message, error.code, error.param)
    return RemoteError("XDeepServeError", f"the peer failed with {type(error).__name__}")


def to_local(error: RemoteError) -> errors.XDeepServeError:
    """The same error as an exception; unknown kinds become plain XDeepServeError."""
    kind = _KINDS.get(error.kind, errors.XDeepServeError)
    return kind(error.message, code=error.code, param=error.param)


def fresh(error: errors.XDeepServeError) -> errors.XDeepServeError:
    """An equal exception, for raising one error in several tasks without mixing tracebacks."""
    return to_local(to_remote(error))
