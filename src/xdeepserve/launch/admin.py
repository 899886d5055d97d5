"""`xdeepserve admin`: tenants, projects, API keys and budgets, in the service's database."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

import msgspec

from xdeepserve.launch.accounts import opened_database
from xdeepserve.maas.accounts.accounts import Accounts
from xdeepserve.maas.accounts.records import ApiKey, KeyLimits, NewKey, Project, Scope, Tenant
from xdeepserve.maas.ledger.budgets import MAX_MICRO, Budget, Budgets
from xdeepserve.maas.storage.database import Database

Record = Tenant | Project | ApiKey | NewKey | Budget

Action = Callable[[Database, argparse.Namespace], Sequence[Record]]

_DAY_S: Final = 86_400
_MICRO: Final = 1_000_000
MAX_DAYS: Final = 36_500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    objects = parser.add_subparsers(dest="object", required=True, metavar="OBJECT")
    for name, text, add in (
        ("tenant", "who pays", _add_tenant),
        ("project", "parts of a tenant", _add_project),
        ("key", "API keys of a project", _add_key),
        ("budget", "what a tenant may spend", _add_budget),
    ):
        sub = objects.add_parser(name, help=text, description=text)
        add(sub.add_subparsers(dest="verb", required=True, metavar="ACTION"))
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Do one thing in the database and print what it has then."""
    action: Action = args.action
    with opened_database() as database:
        records = action(database, args)
    if args.json:
        print(msgspec.json.encode(records).decode())
        return 0
    for record in records:
        print(describe(record))
    return 0


def describe(record: Record) -> str:
    """One line for people; a new key's secret has a second one."""
    match record:
        case Tenant():
            return f"{record.id}  {record.name}  since {_date(record.created_us)}"
        case Project():
            return f"{record.id}  {record.name}  of {record.tenant_id}"
        case ApiKey():
            return _describe_key(record)
        case NewKey():
            return f"{_describe_key(record.key)}\n{record.secret}  (shown this once; keep it safe)"
        case Budget():
            return _describe_budget(record)


def _describe_key(key: ApiKey) -> str:
    parts = [key.id, f"...{key.hint}", key.name, f"{key.scope} key of {key.project_id}"]
    for name in key.limits.__struct_fields__:
        if allowed := getattr(key.limits, name):
            parts.append(f"{name}: {', '.join(allowed)}")
    if key.revoked_us is not None:
        parts.append(f"revoked {_date(key.revoked_us)}")
    elif key.expires_us is not None:
        parts.append(f"until {_date(key.expires_us)}")
    return "  ".join(parts)


def _describe_budget(budget: Budget) -> str:
    of_month = f" of {budget.month}" if budget.month else ""
    return (
        f"{budget.tenant_id}  {budget.kind}{of_month}: {_money(budget.amount_micro)}, spent "
        f"{_money(budget.spent_micro)}, reserved {_money(budget.reserved_micro)}, left "
        f"{_money(budget.left_micro)}"
    )


def _money(micro: int) -> str:
    return f"{Decimal(micro) / _MICRO:.6f}"


def _date(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).strftime("%Y-%m-%d %H:%M UTC")


def money(text: str) -> int:
    """Micro-units of an amount like `12.50`.

    Raises:
        ArgumentTypeError: it is no amount, or not in whole micro-units.
    """
    try:
        micro = Decimal(text) * _MICRO
        if abs(micro) <= MAX_MICRO and micro == micro.to_integral_value():
            return int(micro)
    except ArithmeticError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not an amount like 12.50, to six decimals")


def days(text: str) -> float:
    """How long a key is good.

    Raises:
        ArgumentTypeError: not a number of days above 0, or more than a century.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= MAX_DAYS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days, up to {MAX_DAYS}")
    return number


def _action(actions: Any, name: str, text: str, action: Action) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print records as JSON")
    parser.set_defaults(action=action)
    return parser


def _add_tenant(actions: Any) -> None:
    create = _action(
        actions, "create", "add one", lambda db, args: [Accounts(db).create_tenant(args.name)]
    )
    create.add_argument("name", metavar="NAME")
    _action(actions, "list", "all of them", lambda db, args: Accounts(db).list_tenants())


def _add_project(actions: Any) -> None:
    create = _action(
        actions,
        "create",
        "add one",
        lambda db, args: [Accounts(db).create_project(args.tenant, args.name)],
    )
    create.add_argument("name", metavar="NAME")
    listing = _action(
        actions, "list", "of a tenant", lambda db, args: Accounts(db).list_projects(args.tenant)
    )
    for parser in (create, listing):
        parser.add_argument("--tenant", required=True, help="id or name")


def _add_key(actions: Any) -> None:
    create = _action(actions, "create", "make one; its secret is shown once", _create_key)
    create.add_argument("--tenant", required=True, help="id or name")
    create.add_argument("--project", default="default", help="id or name (default: %(default)s)")
    create.add_argument("--name", default="key", help="for people (default: %(default)s)")
    create.add_argument(
        "--scope",
        choices=[str(scope) for scope in Scope],
        default=str(Scope.INFERENCE),
        help="what it opens (default: %(default)s)",
    )
    create.add_argument("--models", nargs="+", default=[], help="only these (default: all)")
    create.add_argument(
        "--networks", nargs="+", default=[], help="only from these addresses or CIDR ranges"
    )
    create.add_argument("--days", type=days, help="how long it is good (default: for ever)")
    listing = _action(
        actions, "list", "of all, or one", lambda db, args: Accounts(db).list_keys(args.tenant)
    )
    listing.add_argument("--tenant", help="id or name")
    revoke = _action(
        actions, "revoke", "end one", lambda db, args: [Accounts(db).revoke_key(args.id)]
    )
    revoke.add_argument("id", metavar="ID", help="key-...")


def _create_key(database: Database, args: argparse.Namespace) -> Sequence[Record]:
    expires_us = None if args.days is None else int((time.time() + args.days * _DAY_S) * 1e6)
    new = Accounts(database).create_key(
        args.tenant,
        args.name,
        project=args.project,
        scope=Scope(args.scope),
        limits=KeyLimits(models=tuple(args.models), networks=tuple(args.networks)),
        expires_us=expires_us,
    )
    return [new]


def _add_budget(actions: Any) -> None:
    show = _action(actions, "show", "what is left", _show_budget)
    monthly = _action(
        actions,
        "monthly",
        "so much in each month, and no more",
        lambda db, args: [Budgets(db).set_monthly(args.tenant, args.amount)],
    )
    credit = _action(
        actions,
        "credit",
        "so much was paid in advance; negative to take it back",
        lambda db, args: [Budgets(db).add_credit(args.tenant, args.amount, args.note)],
    )
    credit.add_argument("--note", default="", help="what it was for")
    for parser in (monthly, credit):
        parser.add_argument(
            "amount", type=money, metavar="AMOUNT", help="of the price table's currency: 12.50"
        )
    for parser in (show, monthly, credit):
        parser.add_argument("--tenant", required=True, help="id or name")


def _show_budget(database: Database, args: argparse.Namespace) -> Sequence[Record]:
    budget = Budgets(database).show(args.tenant)
    return [] if budget is None else [budget]
