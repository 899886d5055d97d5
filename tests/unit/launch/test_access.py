"""Whether a service is open is decided by its keys, and never towards other machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xdeepserve import envs
from xdeepserve.config import GatewayConfig
from xdeepserve.errors import ConfigError
from xdeepserve.launch.access import opened_accounts
from xdeepserve.launch.cli import main
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.secrets import digest_of
from xdeepserve.maas.storage.database import Database


@pytest.fixture(params=["by default", "by URL"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where the database will be."""
    url = f"sqlite:///{tmp_path / 'elsewhere' / 'x.db'}" if request.param == "by URL" else None
    with envs.HOME.override(str(tmp_path)), envs.DATABASE_URL.override(url):
        yield tmp_path / ("service.db" if url is None else "elsewhere/x.db")


def admin(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert main(["admin", *arguments, "--json"]) == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return found


def make_key(capsys: pytest.CaptureFixture[str]) -> str:
    admin(capsys, "tenant", "create", "acme")
    (new,) = admin(capsys, "key", "create", "--tenant", "acme")
    return str(new["secret"])


def test_without_a_key_it_is_open_on_this_machine(path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        with opened_accounts(GatewayConfig(host=host)) as access:
            assert (access.keys, access.admin) == (None, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_without_a_key_it_is_not_open_to_others(
    path: Path, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = GatewayConfig(host=host)
    with pytest.raises(ConfigError, match="xds admin"), opened_accounts(config):
        pass
    admin(capsys, "tenant", "create", "acme")
    with pytest.raises(ConfigError, match="xds admin"), opened_accounts(config):
        pass


def test_an_admin_api_needs_a_key(path: Path) -> None:
    with pytest.raises(ConfigError, match="key"), opened_accounts(GatewayConfig(admin_port=1)):
        pass


async def test_with_a_key_it_is_closed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = make_key(capsys)
    with opened_accounts(GatewayConfig(host="0.0.0.0")) as access:
        assert access.keys is not None
        assert (await access.keys.caller(f"Bearer {secret}", None)).tenant_id


def test_the_life_of_a_key(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tenant,) = admin(capsys, "tenant", "create", "acme")
    assert admin(capsys, "tenant", "list") == [tenant]
    admin(capsys, "project", "create", "lab", "--tenant", "acme")
    assert len(admin(capsys, "project", "list", "--tenant", "acme")) == 2
    arguments = ["--project", "lab", "--models", "a", "b", "--networks", "10.0.0.0/8"]
    arguments += ["--days", "1"]
    (new,) = admin(capsys, "key", "create", "--tenant", "acme", *arguments)
    database = Database(f"sqlite:///{path}")
    key = Accounts(database).find_key(digest_of(str(new["secret"])))
    database.close()
    assert key is not None
    assert (key.limits.models, key.limits.networks) == (("a", "b"), ("10.0.0.0/8",))
    assert key.expires_us is not None
    assert key.expires_us - key.created_us == pytest.approx(86_400e6, abs=60e6)
    (revoked,) = admin(capsys, "key", "revoke", key.id)
    assert admin(capsys, "key", "list", "--tenant", "acme") == [revoked]
    assert revoked["revoked_us"]


def test_people_read_lines(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["tenant", "create", "acme"], ["key", "create", "--tenant", "acme"]):
        assert main(["admin", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1] == "acme"
    assert lines[2].startswith("xds-")
    secret = lines[2].split()[0]
    assert main(["admin", "key", "list"]) == 0
    listed = capsys.readouterr().out
    assert secret not in listed
    assert secret[-4:] in listed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["key", "create", "--tenant", "nobody"], "no tenant 'nobody'"),
        (["key", "revoke", "key-1"], "no key 'key-1'"),
        (["tenant", "create", ""], "printable"),
    ],
)
def test_errors_are_one_line(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    assert main(["admin", *arguments]) == 1
    assert problem in capsys.readouterr().err


def test_an_open_service_does_without_a_database_library() -> None:
    check = "import sys, xdeepserve.launch.access; sys.exit('sqlalchemy' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ["key", "create", "--tenant", "a", "--days", "nan"],
        ["key", "create", "--tenant", "a", "--days", "1e9"],
        ["budget", "credit", "1.0000001", "--tenant", "a"],
        ["budget", "credit", "1e999999999", "--tenant", "a"],
        ["budget", "monthly", "much", "--tenant", "a"],
    ],
)
def test_numbers_that_are_none_are_said_to_be(
    path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["admin", *arguments])
    assert "is not a" in capsys.readouterr().err


def test_budgets(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    admin(capsys, "tenant", "create", "acme")
    assert admin(capsys, "budget", "show", "--tenant", "acme") == []
    (made,) = admin(capsys, "budget", "credit", "12.5", "--tenant", "acme", "--note", "paid")
    assert (made["kind"], made["amount_micro"]) == ("prepaid", 12_500_000)
    assert admin(capsys, "budget", "show", "--tenant", "acme") == [made]
    assert main(["admin", "budget", "show", "--tenant", "acme"]) == 0
    assert "left 12.500000" in capsys.readouterr().out
    assert main(["admin", "budget", "monthly", "5", "--tenant", "acme"]) == 1
    assert "cannot become monthly" in capsys.readouterr().err
    assert main(["usage", "--tenant", "acme"]) == 0
    assert capsys.readouterr().out.split()[:2] == ["day", "requests"]
