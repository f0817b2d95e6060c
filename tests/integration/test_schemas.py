"""Which schema has the tables: two stores in one database, and tables of other programs."""

from __future__ import annotations

import attrs
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import orderlib
from orderlib import ConfigurationError, OrderNotFound, Outcome
from orderlib.ingestion.records import TopicPartition
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.privileges import PRIVILEGES
from orderlib.postgres.queries import SCHEMA_LOCATION
from tests.support.databases import Database, bootstrap, role_passwords
from tests.support.repository_contract import an_order

SCHEMAS = ("first", "Second shop")


def in_schema(database: Database, schema: str) -> Database:
    """The same database, with URLs that choose a schema, and their passwords."""
    return with_search_path(database, f'"{schema}"'.replace(" ", "\\ "))


def with_search_path(database: Database, value: str) -> Database:
    """The same database, with URLs that choose a search_path."""
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
            consumer.claim_database()
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


#: The tables of migrations of golang-migrate and of Rails.
FOREIGN_TABLES = ("version bigint PRIMARY KEY, dirty boolean NOT NULL", "version varchar PRIMARY KEY")


def create_foreign_table(database: Database, columns: str = FOREIGN_TABLES[0]) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute(f"CREATE TABLE public.schema_migrations ({columns}); CREATE SCHEMA shop".encode())


def schemas_with_orders(database: Database) -> list[str]:
    with psycopg.connect(database.superuser_url) as superuser:
        rows = superuser.execute("SELECT schemaname::text FROM pg_tables WHERE tablename = 'orders' ORDER BY 1")
        return [schema for (schema,) in rows.fetchall()]


@pytest.mark.parametrize("columns", FOREIGN_TABLES)
def test_a_table_of_another_migration_tool_is_named_with_the_remedy(empty_database: Database, columns: str) -> None:
    bootstrap(empty_database)
    create_foreign_table(empty_database, columns)
    for call, url in (
        (orderlib.bootstrap, empty_database.superuser_url),
        (orderlib.migrate, empty_database.migrator_url),
        (orderlib.connect, empty_database.reader_url),
    ):
        with pytest.raises(ConfigurationError, match=r"table schema_migrations in schema public .* create a schema"):
            call(url)


@pytest.mark.parametrize("search_path", ["shop", "shop,public"])
def test_a_schema_beside_a_table_of_another_migration_tool_gets_its_own_tables(
    empty_database: Database, search_path: str
) -> None:
    create_foreign_table(empty_database)
    shop = with_search_path(empty_database, search_path)
    bootstrap(shop)
    with pytest.raises(ConfigurationError, match=r"schema is at migration 0, .*: run `python -m orderlib migrate`"):
        orderlib.connect(shop.writer_url)
    assert len(orderlib.migrate(shop.migrator_url)) > 1
    assert schemas_with_orders(shop) == ["shop"]
    with orderlib.connect(shop.writer_url) as repository:
        assert repository.save(an_order("order", 1)) is Outcome.STORED
        repository.check()
    assert orderlib.migrate(shop.migrator_url) == []
    assert bootstrap(shop) == orderlib.BootstrapResult(corrected=(), remaining=())


def test_a_table_of_another_migration_tool_that_hides_the_tables_is_never_read(empty_database: Database) -> None:
    create_foreign_table(empty_database)
    shop = with_search_path(empty_database, "shop")
    bootstrap(shop)
    orderlib.migrate(shop.migrator_url)
    hidden = with_search_path(empty_database, "public,shop")
    with pytest.raises(ConfigurationError, match=r"tables are in schema shop, but the search_path .* is public,shop"):
        orderlib.connect(hidden.reader_url)
    with pytest.raises(ConfigurationError, match="table schema_migrations in schema public"):
        orderlib.migrate(hidden.migrator_url)


@pytest.mark.parametrize("table", sorted(PRIVILEGES.keys() - {"schema_migrations"}))
def test_a_table_of_another_program_that_hides_one_is_named_with_the_remedy(
    module_database: Database, table: str
) -> None:
    hidden = with_search_path(module_database, "shop,public")
    with psycopg.connect(module_database.superuser_url, autocommit=True) as superuser:
        superuser.execute(
            "DROP SCHEMA IF EXISTS shop CASCADE; CREATE SCHEMA shop; GRANT USAGE ON SCHEMA shop TO PUBLIC"
        )
        with orderlib.connect(hidden.writer_url) as repository:
            repository.check()
        superuser.execute(f"CREATE TABLE shop.{table} (id int)".encode())
    message = rf"^the table shop\.{table} hides that of orderlib in schema public: .*; name public first"
    with pytest.raises(ConfigurationError, match=message):
        orderlib.connect(hidden.reader_url)
    with psycopg.connect(hidden.writer_url) as connection, pytest.raises(ConfigurationError, match=message):
        orderlib.using(connection).check()
    assert orderlib.migrate(hidden.migrator_url) == []
    with orderlib.connect(with_search_path(module_database, "public,shop").reader_url) as repository:
        repository.check()


def test_the_schema_check_knows_every_table() -> None:
    assert "{" + ",".join(PRIVILEGES) + "}" in SCHEMA_LOCATION


def test_tables_in_a_later_schema_of_the_search_path_stay_in_use(database: Database) -> None:
    """`bootstrap`, `migrate` and `connect` use the same schema, so an update never starts an empty set of tables."""
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("CREATE SCHEMA app; GRANT USAGE ON SCHEMA app TO PUBLIC")
        superuser.execute("REVOKE SELECT ON orders FROM orders_reader")
    later = with_search_path(database, "app,public")
    messages: list[str] = []
    corrected = orderlib.bootstrap(later.superuser_url, on_message=messages.append).corrected
    assert 'GRANT SELECT ON "orders" TO "orders_reader"' in corrected
    assert not any("schema app" in text for text in corrected)
    assert [message.partition(",")[0] for message in messages] == ["the tables are in schema public"]
    assert orderlib.migrate(later.migrator_url) == []
    with orderlib.connect(later.writer_url) as repository:
        assert repository.save(an_order("order", 1)) is Outcome.STORED
    with orderlib.connect(database.reader_url) as repository:
        assert repository.get("order") == an_order("order", 1)
    assert schemas_with_orders(database) == ["public"]


def test_a_copy_that_belongs_to_another_role_can_be_read(database: Database) -> None:
    """`pg_restore --no-owner` creates such a copy."""
    with orderlib.connect(database.writer_url) as repository:
        repository.save(an_order("order", 1))
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("REASSIGN OWNED BY orders_owner TO postgres")
    with orderlib.connect(database.reader_url) as repository:
        repository.check()
        assert repository.get("order") == an_order("order", 1)
