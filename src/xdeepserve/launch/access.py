"""Who gets into a service: anybody on this machine, or who has a key."""

from __future__ import annotations

import ipaddress
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from xdeepserve import envs
from xdeepserve.config import GatewayConfig
from xdeepserve.errors import ConfigError
from xdeepserve.launch.accounts import has_database, opened_database
from xdeepserve.maas.access import OPEN, Access
from xdeepserve.maas.accounts.records import Scope
from xdeepserve.maas.gateway import Gateway
from xdeepserve.maas.ledger.billing import Billing
from xdeepserve.maas.ledger.meter import MeterFile
from xdeepserve.maas.ledger.prices import FreePrices, load_prices
from xdeepserve.maas.server import bind_admin, url_of

if TYPE_CHECKING:  # slow to import, and not needed without accounts
    from xdeepserve.maas.storage.database import Database

logger = logging.getLogger(__name__)

METERS: Final = "meters"
"""The folder of meter files, in the home."""

SETTLE_TIMEOUT_S: Final = 10.0
"""For what is over to reach the ledger when a service stops; the rest does when one starts."""


@contextmanager
def opened_accounts(config: GatewayConfig) -> Iterator[Access]:
    """The accounts of a service, while it runs.

    Raises:
        ConfigError: an open service would be reached from other machines, or have an admin API.
        DatabaseError: the database cannot be reached.
    """
    if not has_database():
        _check_open(config)
        yield OPEN
        return
    from xdeepserve.maas.accounts.accounts import Accounts
    from xdeepserve.maas.accounts.authenticator import Authenticator

    with opened_database() as database, ExitStack() as stack:
        if not Accounts(database).has_keys():
            _check_open(config)
            yield OPEN
            return
        admin = None
        if config.admin_port:
            listener = stack.enter_context(bind_admin(config))
            admin = partial(_serving_admin, database, config, listener)
        billing = stack.enter_context(_opened_billing(database, config))
        yield Access(Authenticator(database), billing, admin)


@contextmanager
def _opened_billing(database: Database, config: GatewayConfig) -> Iterator[Billing]:
    """Meters, the ledger's thread and prices; at the end, what is over is settled."""
    from xdeepserve.maas.ledger.writer import LedgerWriter

    prices = load_prices(Path(config.prices)) if config.prices else FreePrices()
    folder = envs.HOME.get() / METERS
    meters = MeterFile(folder / f"{uuid.uuid4().hex}.meter")
    writer = LedgerWriter(database, meters, folder)
    try:
        yield Billing(writer, meters, prices, database)
    finally:
        writer.close(SETTLE_TIMEOUT_S)
        meters.close()


@asynccontextmanager
async def _serving_admin(
    database: Database, config: GatewayConfig, listener: socket.socket, gateway: Gateway
) -> AsyncIterator[None]:
    from xdeepserve.maas.accounts.authenticator import Authenticator
    from xdeepserve.maas.admin.app import create_admin_app
    from xdeepserve.maas.admin.listener import serving

    keys = Authenticator(database, scope=Scope.ADMIN)
    app = create_admin_app(database, keys, gateway.metrics.registry, config.host_names)
    async with serving(app, listener):
        logger.info("admin API on %s", url_of(listener))
        yield


def _check_open(config: GatewayConfig) -> None:
    if not _is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} would let anybody who reaches it use this service; make a key "
            "first (xds admin tenant create NAME, then xds admin key create --tenant NAME), or "
            "listen on 127.0.0.1"
        )
    if config.admin_port:
        raise ConfigError(
            f"--admin-port {config.admin_port} needs a key to be opened with; make one first "
            "(xds admin key create --scope admin --tenant NAME)"
        )
    logger.info("no API key was ever made: whoever is on this machine may use the service")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
