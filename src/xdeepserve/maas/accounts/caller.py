"""Who makes a request, as far as the gateway cares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from starlette.requests import Request
from starlette.types import Scope as AsgiScope

from xdeepserve.maas.accounts.records import ApiKey, Scope

_STATE: Final = "caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner of the key that a request came with; nobody in particular on an open service.

    Attributes:
        models: what they may use; empty = all.
    """

    tenant_id: str = ""
    project_id: str = ""
    key_id: str = ""
    scope: Scope = Scope.INFERENCE
    models: frozenset[str] = frozenset()

    @classmethod
    def of_key(cls, key: ApiKey) -> Caller:
        """The owner of a key that was checked."""
        return cls(
            tenant_id=key.tenant_id,
            project_id=key.project_id,
            key_id=key.id,
            scope=key.scope,
            models=frozenset(key.limits.models),
        )

    def may_use(self, model: str) -> bool:
        """Whether a model exists for them."""
        return not self.models or model in self.models

    def salt(self, own: str) -> str:
        """The prefix-cache salt of their request: tenants never share prefixes."""
        return f"{self.tenant_id}/{own}" if self.tenant_id else own


class KeyChecker(Protocol):
    """Knows whose key is whose; `Authenticator` is one."""

    async def caller(self, authorization: str, address: str | None) -> Caller:
        """Who has the key of an Authorization header and calls from `address`.

        Raises:
            XDeepServeError: nobody (401), or it cannot be known now (503).
        """
        ...


ANYBODY: Final = Caller()
"""Makes all requests of an open service."""


def caller_of(request: Request) -> Caller:
    """Who was let in with this request."""
    caller: Caller = request.scope.get(_STATE, ANYBODY)
    return caller


def let_in(scope: AsgiScope, caller: Caller) -> None:
    """Note who makes the request of an ASGI scope."""
    scope[_STATE] = caller
