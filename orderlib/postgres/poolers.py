"""Recognize a pooler that gives each transaction another session of the server.

Behind it, the settings of a session would be lost, or found in the session of another program.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping

import psycopg
from psycopg import waiting
from psycopg.rows import TupleRow

from orderlib.errors import ConfigurationError, OrderlibError
from orderlib.postgres import queries
from orderlib.postgres.hosts import connect_to_any
from orderlib.postgres.wire import Statement, Wire, run_until

#: A session pooler without a free session does not answer the second connection.
_ANSWER_WITHIN_S = 1.0

#: Where this process has recognized a session pooler: host, port, database and role, because PgBouncer can have another
#: mode for each database and role.
_session_poolers: set[tuple[str, int, str, str]] = set()


def refuse_transaction_pooler(connection: psycopg.Connection[TupleRow], arguments: Mapping[str, str | int]) -> None:
    """Raise ConfigurationError if this connection has another session in each transaction.

    Only a pooler announces another process id than that of the session. Then a second connection begins a transaction:
    a transaction pooler gives it the session of the first one. A direct connection costs one small query.
    """
    host, port = connection.info.host, connection.info.port
    pooler = (host, port, connection.info.dbname, connection.info.user)
    announced = connection.pgconn.backend_pid
    if connection.execute(queries.BACKEND_PID).fetchone() == (announced,) or pooler in _session_poolers:
        return
    token = secrets.token_hex(8)
    connection.execute(queries.MARK_SESSION, {"token": token})
    same_host = {name: value for name, value in arguments.items() if name != "hostaddr"}
    try:
        pgconn = connect_to_any({**same_host, "host": host, "port": port})
    except OrderlibError:
        # A pooler that is full, or an outage. The next connection tries again.
        return
    try:
        wire = Wire(pgconn, keeps_statements=False)

        def rows_of_second(*statements: Statement) -> list[object]:
            steps = run_until(wire.pipeline(*statements), time.monotonic() + _ANSWER_WITHIN_S)
            return [rows for rows in waiting.wait(steps, pgconn.socket, 0.1) if rows]

        try:
            shared = rows_of_second((queries.BEGIN_READ, ()), (queries.SESSION_MARK, ())) == [[(token,)]]
            # The second connection holds its session until its transaction ends.
            kept = not shared and _is_marked(connection, token)
            rows_of_second((queries.ROLLBACK, ()))
        except (psycopg.Error, OrderlibError):
            return
    finally:
        pgconn.finish()
    # A pooler that takes its sessions in turns gives another one now.
    if not kept or not all(_is_marked(connection, token) for _ in range(3)):
        raise ConfigurationError(
            f"a transaction pooler at {host}:{port}: each transaction gets another session; connect to a pooler in "
            "session mode (PgBouncer: pool_mode = session), or to PostgreSQL itself"
        )
    _session_poolers.add(pooler)


def _is_marked(connection: psycopg.Connection[TupleRow], token: str) -> bool:
    return connection.execute(queries.SESSION_MARK).fetchone() == (token,)
