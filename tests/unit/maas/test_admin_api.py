"""The admin API does what `Accounts` does, and says why when it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from tests.databases import opened
from tests.unit.maas.asgi import Call, call
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.authenticator import Authenticator
from xdeepserve.maas.accounts.records import Scope
from xdeepserve.maas.accounts.secrets import digest_of
from xdeepserve.maas.admin.app import create_admin_app


class Admin:
    """Calls the API with a good key."""

    def __init__(self, app: Starlette, accounts: Accounts) -> None:
        self._app = app
        self.accounts = accounts
        accounts.create_tenant("operator")
        secret = accounts.create_key("operator", "k", scope=Scope.ADMIN).secret
        self._headers = {"authorization": f"Bearer {secret}"}

    async def __call__(self, method: str, path: str, body: Any = None) -> Call:
        return await call(self._app, path, body, method=method, headers=self._headers)


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[Admin]:
    with opened(f"sqlite:///{tmp_path / 'service.db'}") as database:
        keys = Authenticator(database, scope=Scope.ADMIN)
        app = create_admin_app(database, keys, CollectorRegistry(), [])
        yield Admin(app, Accounts(database))


async def test_a_tenant_from_birth_to_a_revoked_key(admin: Admin) -> None:
    made = await admin("POST", "/admin/tenants", {"name": "acme"})
    assert made.status == 201
    tenant = made.json()
    assert tenant in (await admin("GET", "/admin/tenants")).json()
    path = f"/admin/tenants/{tenant['id']}"
    project = (await admin("POST", f"{path}/projects", {"name": "lab"})).json()
    assert project in (await admin("GET", f"{path}/projects")).json()
    wanted = {"project": "lab", "limits": {"models": ["m"]}, "expires_us": 1 << 57}
    new = await admin("POST", f"{path}/keys", wanted)
    assert new.status == 201
    found = admin.accounts.find_key(digest_of(new.json()["secret"]))
    assert found is not None
    assert (found.project_id, found.limits.models) == (project["id"], ("m",))
    listed = await admin("GET", f"{path}/keys")
    assert listed.json() == [new.json()["key"]]
    assert new.json()["secret"] not in listed.body.decode()
    gone = await admin("DELETE", f"/admin/keys/{found.id}")
    assert gone.json()["revoked_us"] > 0


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/tenants", {"name": ""}, 400),
        ("POST", "/admin/tenants", {"name": "operator"}, 409),
        ("POST", "/admin/tenants", {"name": "a", "surprise": 1}, 400),
        ("POST", "/admin/tenants", b"{", 400),
        ("POST", "/admin/tenants/nobody/projects", {"name": "a"}, 404),
        ("GET", "/admin/tenants/nobody/keys", None, 404),
        ("POST", "/admin/tenants/operator/keys", {"scope": "root"}, 400),
        ("POST", "/admin/tenants/operator/keys", {"limits": {"networks": ["x"]}}, 400),
        ("DELETE", "/admin/keys/key-1", None, 404),
        ("GET", "/admin/nowhere", None, 404),
        ("PUT", "/admin/tenants", None, 405),
    ],
)
async def test_what_is_wrong_is_said(
    admin: Admin, method: str, path: str, body: Any, status: int
) -> None:
    done = await admin(method, path, body)
    assert done.status == status
    assert done.json()["error"]["message"]
    assert len(admin.accounts.list_tenants()) == 1
