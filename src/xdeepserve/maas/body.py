"""Request body -> validated struct: bounded while reading, every fault a clear 4xx."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from xdeepserve.errors import PayloadTooLarge, RequestError
from xdeepserve.maas.http_errors import ClientGone, RequestTimeout

T = TypeVar("T")

READ_TIMEOUT_S = 60.0
MAX_LENGTH_DIGITS = 18
_PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$")
_HIGH_SURROGATE = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}")
LONE_SURROGATE = "a string has half of a surrogate pair (\\ud800 to \\udfff) without the other half"
_MISSING = re.compile(r"^Object missing required field `(\w+)`$")


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Whole body.

    Raises:
        PayloadTooLarge: longer than `max_bytes`, by its header or while reading.
        RequestTimeout: not complete within READ_TIMEOUT_S.
        ClientGone: the client went away.
    """
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and len(declared) <= MAX_LENGTH_DIGITS:
        _check_size(int(declared), max_bytes)
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for chunk in request.stream():
                size += len(chunk)
                _check_size(size, max_bytes)
                chunks.append(chunk)
    except TimeoutError:
        raise RequestTimeout(f"the body was not complete after {READ_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(chunks)


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise PayloadTooLarge(
            f"the request body exceeds {max_bytes} bytes; send a shorter one",
            code="request_too_large",
        )


def parse_json(body: bytes, kind: type[T]) -> T:
    """Decode and check the types of a JSON body.

    Raises:
        RequestError: not UTF-8, not JSON, nested too deeply, or a field has the wrong type;
            `param` names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        raise _type_error(str(exc)) from exc
    except msgspec.DecodeError as exc:
        reason = LONE_SURROGATE if _is_lone_surrogate(body, str(exc)) else str(exc)
        raise RequestError(f"the body is not valid JSON: {reason}", code="invalid_json") from exc
    except UnicodeDecodeError as exc:
        raise RequestError(f"the body is not UTF-8: {exc.reason}", code="invalid_json") from exc
    except RecursionError as exc:
        raise RequestError("the body is nested too deeply", code="invalid_json") from exc


def _is_lone_surrogate(body: bytes, message: str) -> bool:
    """msgspec calls a high surrogate within six bytes of the end truncated input."""
    if "surrogate" in message:
        return True
    return "truncated" in message and _HIGH_SURROGATE.search(body[-11:]) is not None


def _type_error(message: str) -> RequestError:
    """msgspec's sentence, with the path of the field first and in `param`."""
    path = _PATH.search(message)
    missing = _MISSING.search(message)
    if missing:
        return RequestError(message, param=missing.group(1))
    if path is None or not path.group(1):
        return RequestError(_PATH.sub("", message))
    return RequestError(f"{path.group(1)}: {_PATH.sub('', message)}", param=path.group(1))
