"""The secrets of API keys. Only a digest is stored.

A secret is 256 random bits, so one SHA-256 is as good as a slow password hash: there is nothing to
guess. It is found by its digest; how long that takes tells nothing about secrets that exist.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

PREFIX: Final = "xds-"
NUM_BYTES: Final = 32
HINT_LENGTH: Final = 4
MAX_LENGTH: Final = 256
"""Of what is taken for a secret at all."""


def new_secret() -> str:
    """A secret that nobody has."""
    return PREFIX + secrets.token_urlsafe(NUM_BYTES)


def digest_of(secret: str) -> bytes:
    """32 bytes that a secret is found by."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def hint_of(secret: str) -> str:
    """What is shown of a secret later, to tell keys apart."""
    return secret[-HINT_LENGTH:]


def new_id(kind: str) -> str:
    """A unique id, for example `key-3f2a...`."""
    return f"{kind}-{secrets.token_hex(12)}"
