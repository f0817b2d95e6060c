"""The plans of reads: made once, and good for tables of any size."""

from __future__ import annotations

import datetime as dt
from random import Random

import psycopg

import orderlib
from orderlib import PostgresOrderRepository
from orderlib.postgres.reads import ReadQueries
from orderlib.postgres.wire import Wire
from services.sender.generate import generate_order
from tests.support.databases import Database
from tests.support.waiting import wait_for

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
#: PostgreSQL plans the first five executions of a prepared statement for their parameters.
EXECUTIONS = 8
#: A read of this number of orders exceeds its time limit if it searches all keys for each order.
MANY = 5_000
NAME = "read-plans"
TABLES = ("orders", "delivery", "payment", "items")
#: BEGIN, the join, the items, COMMIT, and the digests.
STATEMENTS = 5


def read_everything(repository: PostgresOrderRepository, order_uid: str) -> None:
    repository.get(order_uid)
    repository.get_many([order_uid, "b", "c"])
    repository.content_sha256(order_uid)
    repository.original(order_uid)
    repository.find(order_uid)
    repository.list_orders(limit=5)
    repository.list_orders(customer_id="x", track_number="x", phone="+1", email="a@b")
    repository.count(customer_id="x")
    repository.stats()


def scanned_rows(superuser: psycopg.Connection) -> dict[str, int]:
    """Return how many rows sequential scans have read, by table."""
    return dict(superuser.execute("SELECT relname, seq_tup_read FROM pg_stat_user_tables").fetchall())


def test_a_table_that_has_grown_is_not_scanned(database: Database) -> None:
    """A session keeps the plans that it made while the tables were nearly empty."""
    rng = Random(5)
    orders = [generate_order(rng, lambda: NOW) for _ in range(MANY)]
    uid = orders[0].order_uid
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        before = scanned_rows(superuser)
        for table in TABLES:
            superuser.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
        with (
            orderlib.connect(database.writer_url) as writer,
            orderlib.connect(database.reader_url, application_name=NAME) as reader,
        ):
            writer.save_many(orders[:3])
            for _ in range(EXECUTIONS):
                read_everything(reader, uid)
            writer.save_many(orders[3:])
            read_everything(reader, uid)
        # A session reports what it has read when it ends.
        sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        wait_for(lambda: superuser.execute(sessions, [NAME]).fetchone() == (0,))
        after = scanned_rows(superuser)
    assert {table: after[table] - before[table] for table in TABLES if after[table] - before[table] >= MANY} == {}


def test_one_read_finds_thousands_of_orders(database: Database) -> None:
    """Also with a plan that was made for a few."""
    rng = Random(6)
    orders = [generate_order(rng, lambda: NOW) for _ in range(MANY)]
    uids = [order.order_uid for order in orders]
    with orderlib.connect(database.writer_url) as repository:
        repository.save_many(orders)
        with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
            superuser.execute("ANALYZE")
        for _ in range(EXECUTIONS):
            repository.get_many(uids[:10])
        assert repository.get_many(uids) == {order.order_uid: order for order in orders}


def test_any_text_is_a_key(database: Database) -> None:
    """The keys are sent as one array, whose text has its own special characters."""
    order = generate_order(Random(8), lambda: NOW)
    others = ["", " ", '"', "\\", '\\"', 'a","b', "{}", "a,b", "NULL", "null", "'", "ä"]
    with orderlib.connect(database.writer_url) as repository:
        repository.save(order)
        assert repository.get_many([*others, order.order_uid]) == {order.order_uid: order}
        assert repository.get_many(others) == {}
        assert repository.get_many([]) == {}


def test_a_read_of_several_orders_is_planned_once(database: Database) -> None:
    rng = Random(7)
    orders = [generate_order(rng, lambda: NOW) for _ in range(1_000)]
    uids = [order.order_uid for order in orders]
    with orderlib.connect(database.writer_url) as repository:
        repository.save_many(orders)
    for count in (1, 2, 9, 20):
        with psycopg.connect(database.superuser_url, autocommit=True) as connection:
            connection.execute("ANALYZE")
            read_queries = ReadQueries(Wire(connection.pgconn))
            for _ in range(4 * EXECUTIONS):
                assert len(connection.wait(read_queries.get_many_stored(uids[:count], 100))) == count
                assert len(connection.wait(read_queries.many_content_sha256(uids[:count]))) == count
            plans = connection.execute("SELECT statement, custom_plans FROM pg_prepared_statements").fetchall()
        assert len(plans) == STATEMENTS
        assert [statement for statement, custom_plans in plans if custom_plans > EXECUTIONS] == [], count
