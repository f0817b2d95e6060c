"""``bootstrap``: an administrator creates the roles, and gives them the database and its tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping

import attrs
import psycopg
from psycopg import sql

from orderlib.errors import ConfigurationError
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, connection_arguments, open_connection
from orderlib.postgres.ddl import ignore_message, run_ddl
from orderlib.postgres.grants import correct_grants
from orderlib.postgres.privileges import MIGRATOR, OWNER, READER, ROLES, WRITER
from orderlib.postgres.schema import quote_identifier, require_usable_database, schema_location, schema_to_set_up
from orderlib.repository import require_type

#: The errors of a correction that this role may not make.
_NOT_ALLOWED = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.InvalidGrantor,
    psycopg.errors.InvalidGrantOperation,
)


@attrs.frozen(kw_only=True)
class RoleProblem:
    """A wrong attribute, membership or privilege."""

    #: Whether the programs cannot work with it.
    is_required: bool
    text: str
    #: The statement that corrects it, if there is one.
    remedy: str | None

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}" if self.remedy else self.text


@attrs.frozen(kw_only=True)
class BootstrapResult:
    """What ``bootstrap`` corrected, and what only another administrator can correct.

    Each line has the statement or the command for it, if there is one.
    """

    #: What was wrong, and is correct now.
    corrected: tuple[str, ...]
    #: What is still wrong. The programs work all the same.
    remaining: tuple[str, ...]


def bootstrap(
    url: str,
    *,
    migrator_password: str | None = None,
    writer_password: str | None = None,
    reader_password: str | None = None,
    application_name: str = "orderlib",
    on_message: Callable[[str], None] | None = None,
) -> BootstrapResult:
    """Create the roles orders_owner, orders_migrator, orders_writer and orders_reader, with their privileges.

    ``url`` belongs to a superuser, or to a role with CREATEROLE that owns the database. Each given password replaces
    the one that the role had. Without one, an existing role stays as it is, and a new role cannot log in. orders_owner
    can never log in. PostgreSQL receives only the SCRAM verifier of a password. Also corrects attributes, memberships
    and privileges that are not as they must be, and returns what this role may not correct. Idempotent, and safe to run
    concurrently: ``on_message`` receives the holder of each lock that this waits for. The schema is the one that
    ``migrate`` uses; ``on_message`` names it if the URL has another one first in its search_path.

    Raises ConfigurationError, with nothing changed, for a password that is empty, contains NUL or cannot be encoded as
    UTF-8, for a server older than PostgreSQL 16, for a database that is not UTF8, for a schema in which another program
    has a table ``schema_migrations``, or if this role may not do what is necessary; and DatabaseUnavailable, if there
    is no connection, or no lock within a minute. Tables and orders are never changed.
    """
    passwords = {MIGRATOR: migrator_password, WRITER: writer_password, READER: reader_password}
    given = {role: _require_password(role, password) for role, password in passwords.items() if password is not None}
    tell = on_message or ignore_message
    # Of two concurrent calls, one fails at a role or at the database's entry. It starts again and finds the work done.
    conflicts = (
        psycopg.errors.UniqueViolation,
        psycopg.errors.DuplicateObject,
        psycopg.errors.InternalError_,
    )
    with open_connection(url, application_name=application_name) as connection:
        return run_ddl(connection, lambda: _bootstrap(connection, given, tell), conflicts, tell)


def _require_password(role: str, password: str) -> str:
    """Return the password. Raises ConfigurationError if libpq could not set it or log in with it."""
    require_type(f"the password of {role}", password, str)
    if not password:
        raise ConfigurationError(f"the password of {role} is empty")
    if "\0" in password:
        raise ConfigurationError(f"the password of {role} contains NUL: libpq would use only the part before it")
    if any("\ud800" <= character <= "\udfff" for character in password):
        raise ConfigurationError(f"the password of {role} contains a lone surrogate, which UTF-8 cannot encode")
    return password


def _bootstrap(
    connection: Connection, passwords: Mapping[str, str], on_message: Callable[[str], None]
) -> BootstrapResult:
    require_usable_database(connection)
    schema = schema_to_set_up(connection, on_message)
    connection.execute(queries.USE_SCHEMA, {"schema": schema})
    try:
        for (role,) in connection.execute(queries.MISSING_ROLES, {"roles": list(ROLES)}).fetchall():
            connection.execute(sql.SQL(queries.CREATE_ROLE).format(sql.Identifier(role)))
        for role, password in passwords.items():
            verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
            allow_login = sql.SQL(queries.ALLOW_LOGIN)
            connection.execute(allow_login.format(sql.Identifier(role), sql.Literal(verifier.decode())))
    except psycopg.errors.InsufficientPrivilege as exc:
        me = connection.info.user
        raise ConfigurationError(
            f"role {me} may not create or alter the roles ({exc.diag.message_primary}): it must be a superuser or "
            f"have CREATEROLE; if the roles exist already, an administrator must run: GRANT {', '.join(ROLES)} "
            f"TO {sql.Identifier(me).as_string(connection)} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE"
        ) from exc
    corrected = _correct_roles(connection)
    privileges, unknown = _correct_grants_as_owner(connection, schema)
    corrected += privileges + _correct_roles(connection)
    problems = _problems(connection)
    if required := [str(problem) for problem in problems if problem.is_required]:
        raise ConfigurationError(
            f"role {connection.info.user} may not set up this database: it must be a superuser or the database's "
            f"owner; an administrator must correct: {'; '.join(required)}"
        )
    return BootstrapResult(corrected=tuple(corrected), remaining=(*map(str, problems), *unknown))


def _problems(connection: Connection) -> list[RoleProblem]:
    rows = connection.execute(queries.ROLE_PROBLEMS).fetchall()
    return [RoleProblem(is_required=required, text=text, remedy=remedy) for required, text, remedy in rows]


def _correct_roles(connection: Connection) -> list[str]:
    """Correct what this connection's role may correct. Return the problems that are solved, with the statements."""
    found: dict[str, RoleProblem] = {}
    while todo := [problem for problem in _problems(connection) if problem.remedy and str(problem) not in found]:
        for problem in todo:
            found[str(problem)] = problem
            with contextlib.suppress(*_NOT_ALLOWED), connection.transaction():
                connection.execute((problem.remedy or "").encode())
    remaining = set(map(str, _problems(connection)))
    return [text for text in found if text not in remaining]


def _correct_grants_as_owner(connection: Connection, schema: str) -> tuple[list[str], list[str]]:
    """Correct the privileges on the tables of a schema. Return what was changed, and what was not checked."""
    has_tables = connection.execute(queries.HAS_TABLES, {"schema": schema}).fetchone()
    if has_tables != (True,):
        return [], []
    set_is_temporary = False
    try:
        with connection.transaction():
            connection.execute(queries.BECOME_OWNER)
    except psycopg.errors.InsufficientPrivilege:
        try:
            with connection.transaction():
                connection.execute(queries.ALLOW_BECOMING_OWNER)
                connection.execute(queries.BECOME_OWNER)
            set_is_temporary = True
        except psycopg.errors.InsufficientPrivilege:
            return [], [_unchecked(schema, "run `python -m orderlib migrate`")]
    found = schema_location(connection).found
    corrected = correct_grants(connection) if found else []
    connection.execute(queries.RESET_ROLE)
    if set_is_temporary:
        connection.execute(queries.FORBID_BECOMING_OWNER)
    if found:
        return corrected, []
    return [], [
        _unchecked(
            schema, f"role {OWNER} lacks USAGE on it: GRANT USAGE ON SCHEMA {quote_identifier(schema)} TO {OWNER}"
        )
    ]


def _unchecked(schema: str, remedy: str) -> str:
    return f"the privileges on the tables in schema {schema} could not be checked: {remedy}"


def password_of(role: str, variable: str, url: str) -> str:
    """Return the password in the URL of a role.

    Raises ConfigurationError, naming the variable, if the URL is invalid, logs in as another role or has no password.
    """
    try:
        arguments = connection_arguments(url, application_name="")
    except ConfigurationError as exc:
        raise ConfigurationError(f"{variable}, the URL of {role}: {exc}") from None
    if arguments.get("user") != role:
        raise ConfigurationError(f"{variable} must log in as {role}")
    if not arguments.get("password"):
        raise ConfigurationError(f"{variable} has no password for {role}")
    return str(arguments["password"])
