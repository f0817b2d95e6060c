"""Two stores in two schemas of one database: nothing mixes."""

from __future__ import annotations

import attrs
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import orderlib
from orderlib import ConfigurationError, OrderNotFound, Outcome
from orderlib.ingestion.records import TopicPartition
from orderlib.postgres.consumer_store import ConsumerStore
from tests.support.databases import Database, role_passwords
from tests.support.repository_contract import an_order

SCHEMAS = ("first", "Second shop")


def in_schema(database: Database, schema: str) -> Database:
    """The same database, with URLs that choose a schema, and their passwords."""
    value = f'"{schema}"'.replace(" ", "\\ ")
    urls = {name: make_conninfo(url, options=f"-c search_path={value}") for name, url in attrs.asdict(database).items()}
    return Database(**urls)


@pytest.fixture
def stores(empty_database: Database) -> tuple[Database, Database]:
    first, second = (in_schema(empty_database, schema) for schema in SCHEMAS)
    passwords = role_passwords(empty_database)
    with psycopg.connect(empty_database.superuser_url, autocommit=True) as superuser:
        for schema in SCHEMAS:
            superuser.execute(f'CREATE SCHEMA "{schema}"')
    for store in (first, second):
        result = orderlib.bootstrap(
            store.superuser_url,
            migrator_password=passwords["orders_migrator"],
            writer_password=passwords["orders_writer"],
            reader_password=passwords["orders_reader"],
        )
        assert result.remaining == ()
        with pytest.raises(ConfigurationError):
            orderlib.connect(store.writer_url)
        assert len(orderlib.migrate(store.migrator_url)) > 1
    return first, second


def test_two_stores_in_one_database_do_not_mix(stores: tuple[Database, Database]) -> None:
    first, second = stores
    with orderlib.connect(first.writer_url) as one, orderlib.connect(second.writer_url) as two:
        assert one.save_many([an_order("shared", 1), an_order("only-one", 1)])[Outcome.STORED] == 2
        assert two.save(an_order("shared", 7)) is Outcome.STORED
        assert one.get("shared") == an_order("shared", 1)
        assert two.get("shared") == an_order("shared", 7)
        with pytest.raises(OrderNotFound):
            two.get("only-one")
        listed = [{stored.order.order_uid for stored in store.list_orders().orders} for store in (one, two)]
        streamed = [{stored.order.order_uid for stored in store.stream()} for store in (one, two)]
        assert listed == streamed == [{"shared", "only-one"}, {"shared"}]
        assert [store.stats().stored_recently for store in (one, two)] == [2, 1]
        one.check()
        two.check()
    with psycopg.connect(second.writer_url) as connection:
        assert orderlib.using(connection).get("shared") == an_order("shared", 7)


def test_each_store_has_its_own_consumer_group_and_offsets(stores: tuple[Database, Database]) -> None:
    groups = ("orders-of-first", "orders-of-second")
    partition = TopicPartition("orders", 0)
    for store, group, offset in zip(stores, groups, (5, 9), strict=True):
        consumer = ConsumerStore(store.writer_url, group, lambda: 0.0)
        try:
            consumer.check()
            assert consumer.start_partitions({"orders": "topic-id"}, {partition: offset}) == {partition: offset}
        finally:
            consumer.close()
    with orderlib.connect(stores[0].reader_url) as one, orderlib.connect(stores[1].reader_url) as two:
        states = [store.position_state("orders", 0, 7).state for store in (one, two)]
    assert states == [orderlib.RecordState.WAITING, orderlib.RecordState.HANDLED]


def test_the_migrations_and_privileges_of_one_store_do_not_depend_on_the_other(
    stores: tuple[Database, Database],
) -> None:
    first, second = stores
    with psycopg.connect(first.superuser_url, autocommit=True) as superuser:
        superuser.execute("DROP SCHEMA first CASCADE; CREATE SCHEMA first")
    orderlib.bootstrap(first.superuser_url)
    with pytest.raises(ConfigurationError):
        orderlib.connect(first.writer_url)
    with orderlib.connect(second.writer_url) as two:
        assert two.save(an_order("shared", 1)) is Outcome.STORED
    with psycopg.connect(second.superuser_url, autocommit=True) as superuser:
        superuser.execute("REVOKE SELECT ON orders FROM orders_reader")
    assert len(orderlib.migrate(first.migrator_url)) > 1
    assert orderlib.migrate(second.migrator_url) == []
    with orderlib.connect(second.reader_url) as two, orderlib.connect(first.reader_url) as one:
        assert two.get("shared") == an_order("shared", 1)
        assert one.list_orders().orders == ()


@pytest.mark.usefixtures("stores")
def test_without_a_choice_the_tables_that_exist_are_named(empty_database: Database) -> None:
    for call in (orderlib.connect, orderlib.migrate):
        url = empty_database.reader_url if call is orderlib.connect else empty_database.migrator_url
        with pytest.raises(ConfigurationError, match="the tables are in schema "):
            call(url)
