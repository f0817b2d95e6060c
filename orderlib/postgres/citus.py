"""Citus: distribute the tables of orders over machines, and let the owner of the tables work there.

With Citus, the coordinator runs DDL and DELETE of distributed tables on the workers as the role that runs them here,
which is often the owner of the tables. That role cannot log in. So it may log in on the workers only, with a password
that only superusers of the coordinator can know.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable

from psycopg import sql

from orderlib.errors import ConfigurationError
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, open_connection
from orderlib.postgres.ddl import ignore_message
from orderlib.postgres.errors import translate_errors
from orderlib.postgres.privileges import OWNER


def distribute(
    url: str, *, shards: int, application_name: str, on_message: Callable[[str], None] = ignore_message
) -> None:
    """Distribute every table of this schema that has an order_uid over the workers, by order_uid.

    ``url`` belongs to a superuser of the coordinator. ``shards`` counts only for tables that are not distributed yet.
    Moves the rows that a table has; the table cannot be used meanwhile. Then the hidden rows that remain on the
    coordinator are removed. Also lets orders_owner log in on the workers, which adding a worker undoes. Idempotent.
    ``on_message`` receives the name of each table that was distributed.

    Raises ConfigurationError if the database does not have Citus, has no workers, or has no tables.
    """
    with open_connection(url, application_name=application_name) as connection, translate_errors(connection):
        if connection.execute(queries.HAS_CITUS).fetchone() is None:
            raise ConfigurationError(
                "the database does not have the extension citus: create it on the coordinator and on each worker, add "
                "the workers with citus_add_node, then run `bootstrap`, `migrate` and this command"
            )
        if not connection.execute(queries.CITUS_WORKERS).fetchall():
            raise ConfigurationError("Citus has no workers: add them with citus_add_node, then run `bootstrap`")
        tables = connection.execute(queries.ORDER_TABLES).fetchall()
        if not tables:
            raise ConfigurationError("the tables of orders are not in the search_path of this role: run `migrate`")
        for table, is_distributed in tables:
            if not is_distributed:
                statement = queries.DISTRIBUTE_ORDERS if table == tables[0][0] else queries.DISTRIBUTE_PART
                connection.execute(statement, {"table": table, "orders": tables[0][0], "shards": shards})
                on_message(table)
        for table, _ in tables:
            connection.execute(queries.TRUNCATE_LOCAL_COPY, {"table": table})
        with connection.transaction():
            _let_owner_reach_workers(connection)


def _let_owner_reach_workers(connection: Connection) -> None:
    """Let orders_owner log in on the workers, and only there.

    The password follows from a secret in the catalog of the coordinator: roles belong to all databases of a server, and
    each of them needs the same one.
    """
    connection.execute(queries.KEEP_ROLE_CHANGES_LOCAL)
    if connection.execute(queries.OWNER_VERIFIER).fetchone() == (None,):
        connection.execute(sql.SQL(queries.CHOOSE_OWNER_VERIFIER).format(sql.Literal(secrets.token_urlsafe(32))))
    [secret] = connection.execute(queries.OWNER_VERIFIER).fetchone() or [""]
    password = hashlib.sha256(str(secret).encode()).hexdigest()
    verifier = connection.pgconn.encrypt_password(password.encode(), OWNER.encode(), b"scram-sha-256").decode()
    command = sql.SQL(queries.ALLOW_OWNER_LOGIN_ON_WORKER).format(sql.Literal(verifier)).as_string(connection)
    for address, succeeded, result in connection.execute(queries.RUN_ON_WORKERS, {"command": command}).fetchall():
        if not succeeded:
            raise ConfigurationError(f"Citus: worker {address}: {' '.join(str(result).split())}")
    connection.execute(queries.REMOVE_OWNER_AUTHINFO)
    connection.execute(queries.ADD_OWNER_AUTHINFO, {"authinfo": f"password={password}"})
