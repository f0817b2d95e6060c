"""``bootstrap`` and ``migrate``: roles and tables."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

from orderlib.postgres.connections import Connection, connect
from orderlib.postgres.migrate import LATEST_MIGRATION, bootstrap, check_schema, migrate, role_of
from services.program import EXIT_DONE
from services.settings import database_url

APPLICATION_NAME = "orderlib-admin"

#: Where modules add their commands.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001  argparse has no public name

#: The URLs with the passwords of the login roles.
_ROLE_URLS = ("ORDERS_MIGRATOR_URL", "ORDERS_DATABASE_URL", "ORDERS_READER_URL")


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    parser = commands.add_parser(
        "bootstrap",
        help="create the four roles and set their rights, as an administrator",
        description="Create the roles orders_owner, orders_migrator, orders_writer and orders_reader, with the "
        "passwords in ORDERS_MIGRATOR_URL, ORDERS_DATABASE_URL and ORDERS_READER_URL. Connects with "
        "ORDERS_BOOTSTRAP_URL, which no other command uses: as a superuser, or as a role with CREATEROLE that owns the "
        "database. Idempotent. Sets the passwords to those in the URLs, corrects wrong attributes, memberships and "
        "rights, and lists what only another administrator may correct.",
    )
    parser.set_defaults(command=_bootstrap)
    parser = commands.add_parser(
        "migrate",
        help="create or update the tables",
        description="Apply the missing migrations and restore the rights on the tables (ORDERS_MIGRATOR_URL). "
        "Idempotent, and safe to run concurrently. Waits up to a minute for the lock of each migration, and names "
        "the session that holds it.",
    )
    parser.set_defaults(command=_migrate)


@contextmanager
def connected(environ: Mapping[str, str], url_name: str) -> Iterator[Connection]:
    """Connect to a database, and raise ConfigurationError if its schema is missing or too old for this program."""
    with connect(database_url(environ, url_name), application_name=APPLICATION_NAME) as connection:
        check_schema(connection)
        yield connection


def _bootstrap(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    passwords = dict(role_of(name, database_url(environ, name)) for name in _ROLE_URLS)
    with connect(database_url(environ, "ORDERS_BOOTSTRAP_URL"), application_name=APPLICATION_NAME) as connection:
        result = bootstrap(connection, passwords, _message)
    for text in result.corrected:
        print(f"corrected: {text}")
    for text in result.remaining:
        print(f"needs an administrator: {text}")
    print(f"set up roles orders_owner, {', '.join(passwords)}")
    return EXIT_DONE


def _migrate(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with connect(database_url(environ, "ORDERS_MIGRATOR_URL"), application_name=APPLICATION_NAME) as connection:
        migrate(connection, lambda name: print(f"applied {name}"), _message)
    print(f"the schema is up to date (migration {LATEST_MIGRATION})")
    return EXIT_DONE


def _message(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
