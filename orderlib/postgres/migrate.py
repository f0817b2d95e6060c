"""Roles and schema: an administrator creates the roles, numbered SQL files create the tables as the owner."""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from typing import LiteralString, TypeVar

import attrs
import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from orderlib.errors import ConfigurationError, DatabaseUnavailable
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, connection_arguments, open_connection
from orderlib.postgres.errors import translate, translated_errors
from orderlib.repository import checked_type

OWNER = "orders_owner"
MIGRATOR = "orders_migrator"
WRITER = "orders_writer"
READER = "orders_reader"
ROLES = (OWNER, MIGRATOR, WRITER, READER)

#: The rights on each table, by role. Migrations grant them when they create a table; `migrate` and `bootstrap` restore
#: them after a change. docs/run-in-production.md has the same table.
RIGHTS: Mapping[str, Mapping[str, tuple[LiteralString, ...]]] = {
    "orders": {
        WRITER: (
            "SELECT",
            "INSERT",
            "DELETE",
            "UPDATE (source_topic_id, source_partition, source_offset, source_time)",
        ),
        READER: ("SELECT",),
    },
    "delivery": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "payment": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "items": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "order_originals": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "consumer_groups": {WRITER: ("SELECT", "INSERT"), READER: ("SELECT",)},
    "consumer_offsets": {WRITER: ("SELECT", "INSERT", "UPDATE (next_offset, updated_at)"), READER: ("SELECT",)},
    "rejects": {
        WRITER: ("SELECT", "INSERT", "UPDATE (redriven_at, redrive_outcome)"),
        READER: (
            (
                "SELECT (topic_id, partition, record_offset, topic, record_time, code, faults, rejected_at, "
                "redriven_at, redrive_outcome)"
            ),
        ),
    },
    "erased": {WRITER: ("SELECT", "INSERT", "DELETE"), READER: ("SELECT",)},
    "forgotten": {WRITER: ("SELECT",), READER: ("SELECT",)},
    "reject_digests": {WRITER: (), READER: ("SELECT",)},
    "schema_migrations": {WRITER: ("SELECT",), READER: ("SELECT",)},
}


def _table_rights(role: str) -> tuple[tuple[str, str], ...]:
    """Return the rights of a role on whole tables. PostgreSQL checks those on columns when they are used."""
    return tuple((table, right) for table, roles in RIGHTS.items() for right in roles[role] if "(" not in right)


#: The rights that a program checks when it starts: (table, right).
WRITER_RIGHTS = _table_rights(WRITER)
READER_RIGHTS = _table_rights(READER)

#: How long `bootstrap`, and each migration of `migrate`, waits for a lock before it fails.
LOCK_WITHIN_S = 60.0
#: The errors of a correction that this role may not make.
_NOT_ALLOWED = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.InvalidGrantor,
    psycopg.errors.InvalidGrantOperation,
)
_BETWEEN_TRIES_S = 0.5

T = TypeVar("T")

_FILE = re.compile(r"(\d{4})_\w+\.sql")


def _migrations() -> dict[int, str]:
    """Return the file names of the migrations by number, in order."""
    files = (entry.name for entry in resources.files("orderlib.postgres").joinpath("migrations").iterdir())
    return dict(sorted((int(found[1]), found[0]) for found in map(_FILE.fullmatch, files) if found))


LATEST_MIGRATION = max(_migrations())


@attrs.frozen(kw_only=True)
class Problem:
    """A wrong attribute, membership or right."""

    #: Whether the programs cannot work with it.
    is_required: bool
    text: str
    #: The statement that corrects it, if there is one.
    remedy: str | None

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}" if self.remedy else self.text


@attrs.frozen(kw_only=True)
class BootstrapResult:
    """What ``bootstrap`` corrected, and what only another administrator can correct. Each line has the statement."""

    #: What was wrong and is right now.
    corrected: tuple[str, ...]
    #: What is still wrong. The programs work all the same.
    remaining: tuple[str, ...]


def _ignore(_text: str) -> None:
    """Do nothing with a message."""


def bootstrap(
    url: str,
    *,
    migrator_password: str | None = None,
    writer_password: str | None = None,
    reader_password: str | None = None,
    application_name: str = "orderlib",
    on_message: Callable[[str], None] | None = None,
) -> BootstrapResult:
    """Create the roles orders_owner, orders_migrator, orders_writer and orders_reader, with their rights.

    ``url`` belongs to a superuser, or to a role with CREATEROLE that owns the database. Each given password replaces
    the one that the role had. Without one, an existing role stays as it is, and a new role cannot log in; nobody can
    log in as orders_owner. PostgreSQL receives only the SCRAM verifier of a password. Also corrects attributes,
    memberships and rights that are not as they must be, and returns what this role may not correct. Idempotent, and
    safe to run concurrently: ``on_message`` receives who holds a lock that this waits for.

    Raises ConfigurationError, with nothing changed, for a database that is not UTF8, or if this role may not do what is
    necessary; and DatabaseUnavailable, if there is no connection, or no lock within a minute. Tables and orders are
    never changed.
    """
    passwords = {MIGRATOR: migrator_password, WRITER: writer_password, READER: reader_password}
    given = {
        role: checked_type(f"the password of {role}", password, str)
        for role, password in passwords.items()
        if password is not None
    }
    with open_connection(url, application_name=application_name) as connection:
        return create_roles(connection, given, on_message or _ignore)


def create_roles(
    connection: Connection, passwords: Mapping[str, str], on_message: Callable[[str], None] = _ignore
) -> BootstrapResult:
    """Create the four roles and give them this database. Idempotent, and safe to run concurrently.

    Needs a superuser, or a role with CREATEROLE that owns the database. ``passwords`` sets the passwords of the
    three login roles, by name. Corrects wrong attributes, memberships and rights, and returns those that this
    connection's role may not correct. Raises ConfigurationError, with nothing changed, if the programs could not work:
    the database is not UTF8, or a right is missing.
    """
    # Of two concurrent calls, one fails at a role or at the database's entry. It starts again and finds the work done.
    conflicts = (
        psycopg.errors.UniqueViolation,
        psycopg.errors.DuplicateObject,
        psycopg.errors.InternalError_,
    )
    return _with_locks(connection, lambda: _bootstrap(connection, passwords), conflicts, on_message)


def _bootstrap(connection: Connection, passwords: Mapping[str, str]) -> BootstrapResult:
    _require_utf8(connection)
    schema = _schema_to_set_up(connection)
    connection.execute(queries.USE_SCHEMA, {"schema": schema})
    try:
        for (role,) in connection.execute(queries.MISSING_ROLES, {"roles": list(ROLES)}).fetchall():
            connection.execute(sql.SQL(queries.CREATE_ROLE).format(sql.Identifier(role)))
        for role, password in passwords.items():
            verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256")
            let_log_in = sql.SQL(queries.LET_LOG_IN)
            connection.execute(let_log_in.format(sql.Identifier(role), sql.Literal(verifier.decode())))
    except psycopg.errors.InsufficientPrivilege as exc:
        me = connection.info.user
        raise ConfigurationError(
            f"role {me} may not create or alter the roles ({exc.diag.message_primary}): it must be a superuser or "
            f"have CREATEROLE; if the roles exist already, an administrator must run: GRANT {', '.join(ROLES)} "
            f"TO {sql.Identifier(me).as_string(connection)} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE"
        ) from exc
    corrected = _correct_roles(connection)
    rights, unknown = _correct_rights_as_owner(connection, schema)
    corrected += rights + _correct_roles(connection)
    problems = _problems(connection)
    if required := [str(problem) for problem in problems if problem.is_required]:
        raise ConfigurationError(
            f"role {connection.info.user} may not set up this database: it must be a superuser or the database's "
            f"owner; an administrator must correct: {'; '.join(required)}"
        )
    return BootstrapResult(corrected=tuple(corrected), remaining=(*map(str, problems), *unknown))


def _problems(connection: Connection) -> list[Problem]:
    rows = connection.execute(queries.ROLE_PROBLEMS).fetchall()
    return [Problem(is_required=required, text=text, remedy=remedy) for required, text, remedy in rows]


def _correct_roles(connection: Connection) -> list[str]:
    """Correct what this connection's role may correct. Return the problems that are solved, with the statements."""
    found: dict[str, Problem] = {}
    while todo := [problem for problem in _problems(connection) if problem.remedy and str(problem) not in found]:
        for problem in todo:
            found[str(problem)] = problem
            with contextlib.suppress(*_NOT_ALLOWED), connection.transaction():
                connection.execute((problem.remedy or "").encode())
    remaining = set(map(str, _problems(connection)))
    return [text for text in found if text not in remaining]


def _correct_rights_as_owner(connection: Connection, schema: str) -> tuple[list[str], list[str]]:
    """Correct the rights on the tables, if the schema has any. Return what was changed, and what was not checked."""
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
    found, *_ = _one_row(connection, queries.SCHEMA_LOCATION)
    corrected = _correct_rights(connection) if found else []
    connection.execute(queries.RESET_ROLE)
    if set_is_temporary:
        connection.execute(queries.FORBID_BECOMING_OWNER)
    if found:
        return corrected, []
    return [], [
        _unchecked(schema, f"role {OWNER} lacks USAGE on it: GRANT USAGE ON SCHEMA {_quoted(schema)} TO {OWNER}")
    ]


def _unchecked(schema: str, remedy: str) -> str:
    return f"the rights on the tables in schema {schema} could not be checked: {remedy}"


def _correct_rights(connection: Connection) -> list[str]:
    """As the owner, change the rights on its tables to those in RIGHTS. Return the statements.

    Does not change those of the login roles if the last migration is not this release's: another one has other rights.
    """
    connection.execute(queries.LOCK_SCHEMA)
    rows = connection.execute(queries.TABLE_GRANTS).fetchall()
    grants = {(table, role): (set(rights), is_grantable) for table, role, rights, is_grantable in rows}
    tables = {table for (table,) in connection.execute(queries.TABLES_OF_OWNER).fetchall()}
    [number] = _one_row(connection, queries.SCHEMA_NUMBER)
    wanted: dict[tuple[str, str | None], tuple[LiteralString, ...]] = {}
    if number == LATEST_MIGRATION:
        wanted = {
            (table, role): rights
            for table in RIGHTS.keys() & tables
            for role, rights in {MIGRATOR: (), **RIGHTS[table]}.items()
        }
    corrected: list[str] = []
    for table, role in sorted(grants.keys() | wanted.keys(), key=str):
        rights = wanted.get((table, role), ())
        found, is_grantable = grants.get((table, role), (set(), False))
        if (found == _single_rights(rights) and not is_grantable) or (role in ROLES and (table, role) not in wanted):
            continue
        for statement in ([queries.REVOKE_ALL] if found else []) + ([queries.GRANT_RIGHTS] if rights else []):
            composed = _grant(statement, table, role, rights)
            connection.execute(composed)
            corrected.append(composed.as_string(connection))
    return corrected


def _grant(statement: LiteralString, table: str, role: str | None, rights: Iterable[LiteralString]) -> sql.Composed:
    return sql.SQL(statement).format(
        table=sql.Identifier(table),
        role=sql.Identifier(role) if role else sql.SQL("PUBLIC"),
        rights=sql.SQL(", ").join(map(sql.SQL, rights)),
    )


def _single_rights(rights: Iterable[str]) -> set[str]:
    """Return single rights: ``UPDATE a`` and ``UPDATE b`` for ``UPDATE (a, b)``."""
    single = set()
    for text in rights:
        right, _, columns = text.rstrip(")").partition(" (")
        single |= {f"{right} {column}".strip() for column in columns.split(", ")}
    return single


def password_of(role: str, variable: str, url: str) -> str:
    """Return the password in the URL of a role.

    Raises ConfigurationError, naming the variable, if the URL logs in as another role or has no password.
    """
    arguments = connection_arguments(url, application_name="")
    if arguments.get("user") != role:
        raise ConfigurationError(f"{variable} must log in as {role}")
    if not arguments.get("password"):
        raise ConfigurationError(f"{variable} has no password for {role}")
    return str(arguments["password"])


def migrate(
    url: str,
    *,
    application_name: str = "orderlib",
    on_applied: Callable[[str], None] | None = None,
    on_message: Callable[[str], None] | None = None,
) -> list[str]:
    """Create the tables, or bring them up to date. Return the names of the migrations that were applied now.

    ``url`` belongs to orders_migrator; ``bootstrap`` creates that role. The tables are in the first schema of the
    search_path. To choose another, create it, and add ``options=-csearch_path%3DNAME`` to each URL, also to that of
    ``bootstrap``. Then one database can have several sets of tables, each with its own orders.

    Each migration is applied once, in its own transaction. ``on_applied`` receives its name after that. Also restores
    the rights on the tables. Idempotent, and safe to run concurrently: ``on_message`` receives who holds a lock that
    this waits for, warnings of migrations, and corrected rights.

    Raises ConfigurationError for a role that may not do this, or a database that is not UTF8, and DatabaseUnavailable
    if there is no connection, or no lock within a minute. The migration at fault is rolled back; those before it stay
    applied. Orders are never changed.
    """
    applied: list[str] = []

    def note(name: str) -> None:
        applied.append(name)
        if on_applied:
            on_applied(name)

    with open_connection(url, application_name=application_name) as connection:
        apply_migrations(connection, note, on_message or _ignore)
    return applied


def apply_migrations(
    connection: Connection,
    on_applied: Callable[[str], None] = _ignore,
    on_message: Callable[[str], None] = _ignore,
) -> int:
    """Apply the missing migrations, each in its own transaction as the owner. Return how many were applied.

    Also restores the rights on the tables. Idempotent, and safe to run concurrently. ``on_message`` receives warnings
    of migrations, corrected rights, and the sessions that hold a lock that this waits for. Raises DatabaseUnavailable,
    naming them, if a migration does not get its lock within a minute; the migrations before it stay applied.
    """

    def on_notice(diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.severity_nonlocalized == "WARNING":
            on_message(str(diagnostic.message_primary))

    connection.add_notice_handler(on_notice)
    try:
        # If two calls create the same table, one fails on the catalog's unique index. It retries and finds the table.
        # If two calls grant rights on the same table, one fails with an internal error: "tuple concurrently updated".
        conflicts = (
            psycopg.errors.UniqueViolation,
            psycopg.errors.DuplicateTable,
            psycopg.errors.DuplicateObject,  # the table's row type
            psycopg.errors.InternalError_,
        )
        _with_locks(connection, lambda: _prepare(connection), conflicts, on_message)
        applied = 0
        for number, name in _migrations().items():
            if _with_locks(connection, functools.partial(_apply, connection, number, name), (), on_message):
                on_applied(name)
                applied += 1
        for statement in _with_locks(connection, lambda: _restore_rights(connection), conflicts, on_message):
            on_message(f"corrected: {statement}")
        return applied
    finally:
        connection.remove_notice_handler(on_notice)


def _prepare(connection: Connection) -> None:
    """Create the table of migrations, unless the schema has one.

    If another schema has one, the search_path may be wrong: refuse, unless the URL chooses this schema.
    """
    connection.execute(queries.BECOME_OWNER)
    _require_utf8(connection)
    found, login_role, search_path, other_schema, is_usable = _one_row(connection, queries.SCHEMA_LOCATION)
    if found:
        return
    [chosen] = _one_row(connection, queries.CHOSEN_SCHEMA)
    if other_schema and not chosen:
        raise _not_found(login_role, search_path, other_schema, is_usable=is_usable)
    connection.execute(queries.USE_SCHEMA, {"schema": chosen or _table_schema(connection)})
    connection.execute(queries.SCHEMA_MIGRATIONS)
    connection.execute(queries.LOCK_SCHEMA)
    for role, rights in RIGHTS["schema_migrations"].items():
        connection.execute(_grant(queries.GRANT_RIGHTS, "schema_migrations", role, rights))


def _apply(connection: Connection, number: int, name: str) -> bool:
    """Apply a migration unless it is applied already. Return whether this call applied it."""
    connection.execute(queries.BECOME_OWNER)
    connection.execute(queries.USE_SCHEMA, {"schema": _table_schema(connection)})
    if connection.execute(queries.IS_APPLIED, {"number": number}).fetchone():
        return False
    connection.execute(queries.LOCK_SCHEMA)
    if connection.execute(queries.IS_APPLIED, {"number": number}).fetchone():
        return False
    connection.execute(queries.LIFT_TIME_LIMITS)
    script = resources.files("orderlib.postgres").joinpath("migrations", name).read_text(encoding="utf-8")
    connection.execute(script.encode())
    connection.execute(queries.RECORD_MIGRATION, {"number": number, "name": name})
    return True


def _restore_rights(connection: Connection) -> list[str]:
    connection.execute(queries.BECOME_OWNER)
    connection.execute(queries.USE_SCHEMA, {"schema": _table_schema(connection)})
    return _correct_rights(connection)


def _with_locks(
    connection: Connection,
    work: Callable[[], T],
    conflicts: tuple[type[psycopg.Error], ...],
    on_message: Callable[[str], None],
) -> T:
    """Do the work in a transaction. Retry if it waits too long for a lock or conflicts with another session."""
    deadline_s = time.monotonic() + LOCK_WITHIN_S
    reported = ""
    while True:
        try:
            with translated_errors(connection), connection.transaction():
                try:
                    connection.execute(queries.LIMIT_DDL_LOCK_WAIT)
                    return work()
                except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected) as exc:
                    raise _Conflict(exc) from exc
                except conflicts as exc:
                    raise _Conflict(exc) from exc
        except _Conflict as conflict:
            is_late = time.monotonic() > deadline_s
            if isinstance(conflict.error, psycopg.errors.LockNotAvailable):
                holders = _lock_holders(connection)
                if is_late:
                    raise DatabaseUnavailable(
                        f"PostgreSQL: no lock within {LOCK_WITHIN_S:.0f} s, held by {holders}; this step was rolled "
                        "back, and earlier steps stay applied: run the command again"
                    ) from conflict.error
                if holders != reported:
                    on_message(f"waiting for a lock that is held by {holders}")
                    reported = holders
            elif is_late:
                raise translate(conflict.error) from conflict.error
        time.sleep(_BETWEEN_TRIES_S)


class _Conflict(Exception):
    """A conflict with another session. The transaction was rolled back and may be retried."""

    def __init__(self, error: psycopg.Error) -> None:
        super().__init__(str(error))
        self.error = error


def _lock_holders(connection: Connection) -> str:
    """Return the sessions that may hold the lock, as text."""
    with translated_errors(connection):
        rows = connection.execute(queries.LOCK_HOLDERS).fetchall()
    if not rows:
        return "another session"
    return ", ".join(
        f"pid {pid} (role {role}, application {application or 'unknown'!r})" if pid else "a prepared transaction"
        for pid, role, application in rows
    )


def _require_utf8(connection: Connection) -> None:
    encoding, _ = _one_row(connection, queries.DATABASE)
    if encoding != "UTF8":
        raise ConfigurationError(f"the encoding of the database is {encoding}, but orderlib needs UTF8")


def _schema_to_set_up(connection: Connection) -> str:
    """Return the schema that the URL chooses, or the one that has tables, or the one that gets them."""
    found, _, _, other_schema, _ = _one_row(connection, queries.SCHEMA_LOCATION)
    [chosen] = _one_row(connection, queries.CHOSEN_SCHEMA)
    return chosen or (_table_schema(connection) if found or not other_schema else str(other_schema))


def _table_schema(connection: Connection) -> str:
    """Return the schema of the tables. Raises ConfigurationError if the search_path names no schema that exists."""
    [schema] = _one_row(connection, queries.TABLE_SCHEMA)
    if schema is None:
        raise ConfigurationError(
            "the search_path names no existing schema that this role may use: create one, or change the search_path"
        )
    return str(schema)


def check_schema(connection: Connection) -> None:
    """Raise ConfigurationError, with the remedy, if the schema is missing or older than this program needs."""
    with translated_errors(connection):
        location = _one_row(connection, queries.SCHEMA_LOCATION)
        number = _one_row(connection, queries.SCHEMA_NUMBER)[0] if location[0] else None
    require_schema(location, number)


def require_schema(location: TupleRow, number: int | None) -> None:
    """Do the check of ``check_schema`` on rows of SCHEMA_LOCATION and SCHEMA_NUMBER."""
    found, role, search_path, other_schema, is_usable = location
    if not found and other_schema:
        raise _not_found(role, search_path, other_schema, is_usable=is_usable)
    number = number or 0
    if number < LATEST_MIGRATION:
        raise ConfigurationError(
            f"the schema is at migration {number}, but this program needs migration {LATEST_MIGRATION}: "
            "run `python -m orderlib migrate`"
        )


def _not_found(role: str, search_path: str, schema: str, *, is_usable: bool) -> ConfigurationError:
    if not is_usable:
        return ConfigurationError(
            f"the tables are in schema {schema}, but role {role} lacks USAGE on it: run `python -m orderlib bootstrap`"
        )
    return ConfigurationError(
        f"the tables are in schema {schema}, but the search_path of role {role} is {search_path}: "
        f"run ALTER ROLE {_quoted(role)} SET search_path = {_quoted(schema)}, or set it in the URL's options"
    )


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string()


def check_rights(connection: Connection, rights: Sequence[tuple[str, str]]) -> None:
    """Raise ConfigurationError naming the first of these (table, right) that the session's role lacks."""
    wanted = {"tables": [table for table, _ in rights], "rights": [right for _, right in rights]}
    with translated_errors(connection):
        missing = connection.execute(queries.MISSING_RIGHTS, wanted).fetchone()
    if missing:
        role, table, right = missing
        raise ConfigurationError(f"role {role} lacks {right} on {table}: run `python -m orderlib migrate`")


def _one_row(connection: Connection, statement: LiteralString) -> TupleRow:
    row = connection.execute(statement).fetchone()
    assert row is not None
    return row
