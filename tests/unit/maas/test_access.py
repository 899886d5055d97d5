"""Every route against every kind of key and host: closed by default, and all refusals alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.databases import opened
from tests.unit.maas.asgi import MODEL, call
from tests.unit.maas.replay_engine import ReplayEngine, steps_of
from tests.unit.text.byte_tokenizer import byte_tokenizer
from xdeepserve.config import GatewayConfig
from xdeepserve.maas.access import PUBLIC_PATHS, Access
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.authenticator import Authenticator
from xdeepserve.maas.accounts.records import KeyLimits, Scope
from xdeepserve.maas.admin.app import create_admin_app
from xdeepserve.maas.app import OPEN_ROUTES, ROUTES, create_app
from xdeepserve.maas.storage.database import Database, DatabaseError

PROMPT = {"model": MODEL, "prompt": "a"}
OTHER = "toy-2"


@dataclass
class Service:
    """A service with keys, and its accounts."""

    database: Database
    accounts: Accounts
    engine: ReplayEngine
    app: Starlette
    admin: Starlette

    def secret(self, **options: Any) -> str:
        return self.accounts.create_key("a", "k", **options).secret


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with opened(f"sqlite:///{tmp_path / 'service.db'}") as database:
        accounts = Accounts(database)
        accounts.create_tenant("a")
        accounts.create_tenant("b")
        engine = ReplayEngine(steps_of("hi"))
        app = create_app(
            engine,
            byte_tokenizer(chat_template=None),
            GatewayConfig(allowed_hosts="llm.example.com"),
            model_names=[MODEL, OTHER],
            access=Access(Authenticator(database)),
        )
        admin = create_admin_app(
            database,
            Authenticator(database, scope=Scope.ADMIN),
            app.state.gateway.metrics.registry,
            ["localhost"],
        )
        yield Service(database, accounts, engine, app, admin)


def key_headers(service: Service, scope: Scope) -> dict[str, dict[str, str]]:
    """Headers that must not get in."""
    other_scope = Scope.ADMIN if scope is Scope.INFERENCE else Scope.INFERENCE
    revoked = service.accounts.create_key("a", "k", scope=scope)
    service.accounts.revoke_key(revoked.key.id)
    elsewhere = service.secret(scope=scope, limits=KeyLimits(networks=("192.0.2.0/24",)))
    secrets = {
        "wrong": "xds-" + "A" * 43,
        "revoked": revoked.secret,
        "other scope": service.secret(scope=other_scope),
        "other network": elsewhere,
    }
    headers = {name: {"authorization": f"Bearer {secret}"} for name, secret in secrets.items()}
    good = service.secret(scope=scope)
    return headers | {
        "none": {},
        "in the wrong header": {"x-api-key": good},
        "hostile host": {"authorization": f"Bearer {good}", "host": "evil.example"},
        "hostile host without a key": {"host": "evil.example"},
    }


def routes_of(app: Starlette) -> list[tuple[str, str]]:
    """(path, method) of each route, parameters filled in; and one that is none."""
    found = [("/nowhere", "GET"), ("/v1/nowhere", "POST")]
    for route in app.routes:
        path = route.path.replace("{name:path}", MODEL).replace("{tenant}", "a")  # type: ignore[attr-defined]
        path = path.replace("{key}", "key-1")
        found += [(path, method) for method in route.methods]  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("scope", list(Scope))
async def test_no_route_answers_without_a_key_of_its_own(service: Service, scope: Scope) -> None:
    app = service.app if scope is Scope.INFERENCE else service.admin
    answered = set()
    for kind, headers in key_headers(service, scope).items():
        bodies = set()
        for path, method in routes_of(app):
            done = await call(app, path, PROMPT, method=method, headers=headers)
            if path in PUBLIC_PATHS:
                assert done.status == 200, (path, kind)
                answered.add(path)
                continue
            assert done.status == (421 if "host" in headers else 401), (path, method, kind)
            bodies.add(done.body)
        assert len(bodies) <= 1, kind
    assert answered == (PUBLIC_PATHS if scope is Scope.INFERENCE else set())
    assert service.engine.requests == []


async def test_all_wrong_keys_get_the_same_answer(service: Service) -> None:
    replies = set()
    for headers in key_headers(service, Scope.INFERENCE).values():
        if "host" not in headers:
            done = await call(service.app, "/v1/completions", PROMPT, headers=headers)
            replies.add((done.body, done.headers["www-authenticate"]))
    assert len(replies) == 1
    assert b"invalid_api_key" in replies.pop()[0]


async def test_a_good_key_gets_in_by_every_name(service: Service) -> None:
    headers = {"authorization": f"Bearer {service.secret()}"}
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LLM.example.com:443", "10.0.0.7"):
        done = await call(service.app, "/v1/completions", PROMPT, headers=headers | {"host": host})
        assert done.status == 200, host


async def test_two_hosts_are_none_of_ours(service: Service) -> None:
    app = create_app(
        service.engine, byte_tokenizer(chat_template=None), GatewayConfig(), model_names=[MODEL]
    )
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "client": ("127.0.0.1", 1)}
    scope["headers"] = [(b"host", b"localhost"), (b"host", b"evil.example")]
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    await app(scope, receive, send)
    assert sent[0]["status"] == 421


async def test_a_key_shows_only_its_models(service: Service) -> None:
    secret = service.secret(limits=KeyLimits(models=(OTHER,)))
    headers = {"authorization": f"Bearer {secret}"}
    listed = await call(service.app, "/v1/models", method="GET", headers=headers)
    assert [card["id"] for card in listed.json()["data"]] == [OTHER]
    for path in (f"/v1/models/{MODEL}", "/v1/models/never-heard-of"):
        found = await call(service.app, path, method="GET", headers=headers)
        assert found.status == 404
        assert MODEL + "," not in found.body.decode()
    done = await call(service.app, "/v1/completions", PROMPT, headers=headers)
    assert done.status == 404
    allowed = PROMPT | {"model": OTHER}
    assert (await call(service.app, "/v1/completions", allowed, headers=headers)).status == 200


async def test_tenants_share_no_prefixes(service: Service) -> None:
    for tenant in ("a", "b"):
        secret = service.accounts.create_key(tenant, "k").secret
        headers = {"authorization": f"Bearer {secret}"}
        for body in (PROMPT, PROMPT | {"cache_salt": "x"}):
            await call(service.app, "/v1/completions", body, headers=headers)
    salts = [request.cache_salt for request in service.engine.requests]
    assert len(set(salts)) == 4
    assert [salt.endswith("x") for salt in salts] == [False, True, False, True]


async def test_trouble_of_the_database_stays_inside(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(work: object) -> None:
        raise DatabaseError("no route to db.internal")

    headers = {"authorization": f"Bearer {service.secret()}"}
    monkeypatch.setattr(service.database, "run", fail)
    done = await call(service.app, "/v1/completions", PROMPT, headers=headers)
    assert (done.status, b"db.internal" in done.body) == (503, False)
    assert done.headers["x-request-id"] in done.json()["error"]["message"]
    assert done.headers["retry-after"]


async def test_metrics_are_for_the_operator(service: Service) -> None:
    headers = {"authorization": f"Bearer {service.secret()}"}
    done = await call(service.app, "/metrics", method="GET", headers=headers)
    assert done.status == 404
    headers = {"authorization": f"Bearer {service.secret(scope=Scope.ADMIN)}"}
    done = await call(service.admin, "/metrics", method="GET", headers=headers)
    assert (done.status, b"xdeepserve:request_success" in done.body) == (200, True)


async def test_an_open_service_answers_to_this_machine_alone(service: Service) -> None:
    app = create_app(
        service.engine, byte_tokenizer(chat_template=None), GatewayConfig(), model_names=[MODEL]
    )
    for route in (*ROUTES, *OPEN_ROUTES):
        path = route.path.replace("{name:path}", MODEL)
        for method in route.methods or ():
            headers = {"host": "rebound.example"}
            done = await call(app, path, PROMPT, method=method, headers=headers)
            assert done.status == (200 if path in PUBLIC_PATHS else 421), path
    assert (await call(app, "/v1/completions", PROMPT, headers={"host": "localhost"})).status == 200
