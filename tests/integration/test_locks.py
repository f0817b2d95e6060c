"""Locks that the operator's commands hold or wait for."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg
import pytest

import orderlib
from orderlib import DatabaseUnavailable
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, open_connection
from orderlib.postgres.ddl import ignore_message, run_ddl
from orderlib.postgres.operations import as_owner, forget, purge_old_rejects, reset_offsets
from orderlib.postgres.rejects import redrive
from orderlib.postgres.writes import run_transaction
from orderlib.testing import SAMPLE
from tests.support.batches import batch, consumer_store, ignore
from tests.support.databases import Database
from tests.support.locking import FENCE, TABLE, locked
from tests.support.waiting import wait_for

LIMIT = "SHOW idle_in_transaction_session_timeout"


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    with open_connection(url, application_name="tests") as connection:
        yield connection


def in_redrive(database: Database, work: Callable[[Connection], None]) -> None:
    """Do the work in a transaction of `redrive` or `backfill`."""
    with connected(database.writer_url) as writer:
        run_transaction(writer, lambda: work(writer))


def in_forget(database: Database, work: Callable[[Connection], None]) -> None:
    """Do the work in a transaction of `forget`, `purge` or `offsets`."""
    with connected(database.migrator_url) as migrator, as_owner(migrator):
        work(migrator)


def in_migrate(database: Database, work: Callable[[Connection], None]) -> None:
    """Do the work in a transaction of `migrate` or `bootstrap`."""
    with connected(database.migrator_url) as migrator:
        run_ddl(migrator, lambda: work(migrator), (), ignore_message)


TRANSACTIONS = pytest.mark.parametrize("transaction", [in_redrive, in_forget, in_migrate])
Transaction = Callable[[Database, Callable[[Connection], None]], None]


@TRANSACTIONS
def test_the_session_of_a_suspended_command_ends_and_the_command_says_so(
    database: Database, transaction: Transaction, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = queries.LIMIT_IDLE_IN_TRANSACTION
    monkeypatch.setattr(queries, "LIMIT_IDLE_IN_TRANSACTION", limit.replace("'10s'", "'100ms'"))

    def suspended(connection: Connection) -> None:
        with psycopg.connect(database.superuser_url, autocommit=True) as observer:
            pid = connection.info.backend_pid
            alive = "SELECT FROM pg_stat_activity WHERE pid = %s"
            wait_for(lambda: not observer.execute(alive, [pid]).fetchall(), 30)
        connection.execute("SELECT")

    with pytest.raises(DatabaseUnavailable, match=r"suspended .* rolled back: try again \(25P03\)"):
        transaction(database, suspended)


@TRANSACTIONS
@pytest.mark.parametrize(("of_administrator", "limit"), [("0", "10s"), ("1h", "10s"), ("700ms", "700ms")])
def test_a_command_may_be_idle_in_a_transaction_for_10_s_unless_the_administrator_allows_less(
    database: Database, transaction: Transaction, of_administrator: str, limit: str
) -> None:
    def show(connection: Connection) -> None:
        found.append(connection.execute(LIMIT).fetchone())

    found: list[object] = []
    role = "orders_writer" if transaction is in_redrive else "orders_migrator"
    name = database_name(database)
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        change = f"ALTER ROLE {role} IN DATABASE {name}"
        superuser.execute(f"{change} SET idle_in_transaction_session_timeout = '{of_administrator}'".encode())
        try:
            transaction(database, show)
        finally:
            superuser.execute(f"{change} RESET idle_in_transaction_session_timeout".encode())
    assert found == [(limit,)]


def database_name(database: Database) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(database.superuser_url)["dbname"])


def test_a_users_own_session_is_not_limited(database: Database) -> None:
    with psycopg.connect(database.writer_url) as connection:
        [before] = connection.execute(LIMIT)
        orderlib.using(connection).save(orderlib.decode_order(SAMPLE))
        assert connection.execute(LIMIT).fetchall() == [before]
        connection.rollback()


@pytest.mark.parametrize(
    ("command", "lock"),
    [
        (lambda migrator: forget(migrator, "order"), queries.FORGET_LOCK_SHARED),
        (lambda migrator: purge_old_rejects(migrator, dt.timedelta(0)), "LOCK TABLE rejects"),
        (lambda migrator: reset_offsets(migrator, "tests", "topic", {0: 0}), FENCE),
        (lambda migrator: list(redrive(migrator, 1)), "LOCK TABLE rejects"),
    ],
    ids=["forget", "purge", "offsets reset", "redrive"],
)
def test_a_command_names_the_session_whose_lock_it_needs_and_says_that_nothing_was_changed(
    database: Database, monkeypatch: pytest.MonkeyPatch, command: Callable[[Connection], object], lock: str
) -> None:
    monkeypatch.setattr(queries, "LIMIT_LOCK_WAIT", "SET LOCAL lock_timeout = '100ms'")
    with consumer_store(database) as store:
        store.write(batch(0, (b"key", b"no order")), ignore)
    with (
        psycopg.connect(database.reader_url, application_name="a reader") as reader,
        locked(database, lock) as holder,
        connected(database.superuser_url) as connection,
    ):
        # The lock of a reader blocks no write.
        reader.execute("SELECT FROM orders")
        with pytest.raises(DatabaseUnavailable) as raised:
            command(connection)
        held_by = rf"probably held by pid {holder.info.backend_pid} \(role {holder.info.user}, application '[^']+'\); "
        assert raised.match(rf"no lock within 5 s, {held_by}.* has changed nothing: try again \(55P03\)$")
        holder.rollback()
        command(connection)


@pytest.mark.parametrize("lock", [TABLE, FENCE])
def test_the_consumer_names_the_session_whose_lock_a_batch_needs(
    database: Database, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    monkeypatch.setattr(queries, "LIMIT_LOCK_WAIT", "SET LOCAL lock_timeout = '100ms'")
    with consumer_store(database) as store:
        with locked(database, lock) as holder:
            named = rf"a lock that the batch needs, probably pid {holder.info.backend_pid} \(role {holder.info.user}, "
            with pytest.raises(DatabaseUnavailable, match=named):
                store.write(batch(0, (None, SAMPLE)), ignore)
        store.write(batch(0, (None, SAMPLE)), ignore)
