"""The commands ``bootstrap`` and ``migrate``: of ``python -m orderlib``, and of the admin."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import TypeAlias

from orderlib.entry_point import EXIT_DONE, EXIT_STATUSES
from orderlib.errors import ConfigurationError
from orderlib.postgres.connections import check_url
from orderlib.postgres.migrate import migrate
from orderlib.postgres.privileges import MIGRATOR, OWNER, READER, URL_VARIABLES, WRITER
from orderlib.postgres.roles import bootstrap, password_of
from orderlib.postgres.schema import LATEST_MIGRATION

#: What PostgreSQL shows of a command, also of one of the admin.
APPLICATION_NAME = "orderlib-admin"

#: The object to which commands are added. argparse has no public name for it.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001


def add_commands(commands: Commands) -> None:
    """Add ``bootstrap`` and ``migrate`` to a parser. Each sets ``command``, which takes the options and environment."""
    parser = commands.add_parser(
        "bootstrap",
        help="create the four roles and set their privileges, as an administrator",
        description="Create the roles orders_owner, orders_migrator, orders_writer and orders_reader, with the "
        "passwords in ORDERS_MIGRATOR_URL, ORDERS_DATABASE_URL and ORDERS_READER_URL. Connects with "
        "ORDERS_BOOTSTRAP_URL: as a superuser, or as a role with CREATEROLE that owns the database. Idempotent. "
        "Corrects wrong attributes, memberships and privileges, and lists what only another administrator may correct.",
    )
    parser.set_defaults(command=_bootstrap)
    parser = commands.add_parser(
        "migrate",
        help="create or update the tables",
        description="Apply the missing migrations and restore the privileges on the tables (ORDERS_MIGRATOR_URL). "
        "Idempotent, and safe to run concurrently. Waits up to a minute for the lock of each migration, and names "
        "the session that holds it.",
    )
    parser.set_defaults(command=_migrate)


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run one command of ``python -m orderlib`` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m orderlib",
        description="Create the roles and the tables of orders in a PostgreSQL database.",
        epilog=EXIT_STATUSES,
    )
    add_commands(parser.add_subparsers(metavar="COMMAND", required=True))
    options = parser.parse_args(arguments)
    command: Callable[[argparse.Namespace, Mapping[str, str]], int] = options.command
    return command(options, environ)


def _bootstrap(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    passwords = {role: password_of(role, name, _url(environ, name)) for role, name in URL_VARIABLES.items()}
    result = bootstrap(
        _valid_url(environ, "ORDERS_BOOTSTRAP_URL"),
        migrator_password=passwords[MIGRATOR],
        writer_password=passwords[WRITER],
        reader_password=passwords[READER],
        application_name=APPLICATION_NAME,
        on_message=_print_message,
    )
    for text in result.corrected:
        print(f"corrected: {text}")
    for text in result.remaining:
        print(f"needs an administrator: {text}")
    print(f"set up roles {OWNER}, {', '.join(passwords)}")
    return EXIT_DONE


def _migrate(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    migrate(
        _valid_url(environ, "ORDERS_MIGRATOR_URL"),
        application_name=APPLICATION_NAME,
        on_applied=lambda name: print(f"applied {name}"),
        on_message=_print_message,
    )
    print(f"the schema is up to date (migration {LATEST_MIGRATION})")
    return EXIT_DONE


def _url(environ: Mapping[str, str], name: str) -> str:
    url = environ.get(name, "")
    if not url.strip():
        raise ConfigurationError(f"{name} is not set")
    return url


def _valid_url(environ: Mapping[str, str], name: str) -> str:
    url = _url(environ, name)
    check_url(name, url)
    return url


def _print_message(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
