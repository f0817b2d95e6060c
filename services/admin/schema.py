"""``bootstrap`` and ``migrate``: roles and tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TypeAlias

from orderlib.config import database_url
from orderlib.postgres.connection import connect
from orderlib.postgres.migrate import LATEST_MIGRATION, bootstrap, migrate, role_of
from orderlib.program import EXIT_DONE

APPLICATION_NAME = "orderlib-admin"

#: Where modules add their commands; argparse names it for its own use only.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001

#: Where each role's password stands.
_ROLE_URLS = ("ORDERS_MIGRATOR_URL", "ORDERS_DATABASE_URL", "ORDERS_READER_URL")


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    parser = commands.add_parser(
        "bootstrap",
        help="make the four roles, once, as a superuser",
        description="Make the roles orders_owner, orders_migrator, orders_writer and orders_reader, with the passwords "
        "in ORDERS_MIGRATOR_URL, ORDERS_DATABASE_URL and ORDERS_READER_URL. The only command that connects as a "
        "superuser (ORDERS_BOOTSTRAP_URL). Again is harmless, and changes the passwords to those in the URLs.",
    )
    parser.set_defaults(command=_bootstrap)
    parser = commands.add_parser(
        "migrate",
        help="bring the schema up to date",
        description="Apply the numbered migrations that are missing (ORDERS_MIGRATOR_URL). Twice, or from two machines "
        "at once, is harmless.",
    )
    parser.set_defaults(command=_migrate)


def _bootstrap(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    passwords = dict(role_of(name, database_url(environ, name)) for name in _ROLE_URLS)
    with connect(database_url(environ, "ORDERS_BOOTSTRAP_URL"), application_name=APPLICATION_NAME) as connection:
        bootstrap(connection, passwords)
    print(f"roles are ready: orders_owner, {', '.join(passwords)}")
    return EXIT_DONE


def _migrate(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with connect(database_url(environ, "ORDERS_MIGRATOR_URL"), application_name=APPLICATION_NAME) as connection:
        migrate(connection, lambda name: print(f"applied {name}"))
    print(f"the schema is at {LATEST_MIGRATION}")
    return EXIT_DONE
