"""The repository on PostgreSQL, held to the contract, and what only a server in between can do."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import LiteralString, TypeVar

import attrs
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import orderlib
from orderlib import (
    ConfigurationError,
    DatabaseUnavailable,
    Item,
    Order,
    OrderNotFound,
    OrderRepository,
    Outcome,
    PositionState,
    PostgresOrderRepository,
    RecordState,
    RefusedByDatabase,
    connect,
    connect_async,
    encode_order,
)
from orderlib.contract import unchecked
from orderlib.errors import RejectedError
from orderlib.ingestion.records import Batch, OffsetRange, Record, Reject, TopicPartition
from orderlib.postgres import connections, queries
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.rejects import redrive
from orderlib.repository import STREAM_SIZE, Direction, RecordPosition
from tests.support import ROOT
from tests.support.databases import Database, delete_rows
from tests.support.over_asyncio import event_loop, over_asyncio
from tests.support.repository_contract import (
    HANDLED,
    REJECTED,
    REJECTION,
    SAMPLE_ORDER,
    WAITING,
    PositionContract,
    RepositoryContract,
    StreamContract,
    an_order,
    versions_in,
)
from tests.support.tcp_proxy import TcpProxy

T = TypeVar("T")

#: BEGIN, the orders, the items, COMMIT.
PAGE_STATEMENTS = 4
#: The same, and then BEGIN, the orders, the numbers of their items, the items, COMMIT.
LONG_PAGE_STATEMENTS = 9


@pytest.fixture(scope="module")
def superuser(module_database: Database) -> Iterator[psycopg.Connection]:
    with psycopg.connect(module_database.superuser_url, autocommit=True) as superuser:
        yield superuser


@pytest.fixture
def emptied(module_database: Database, superuser: psycopg.Connection) -> Database:
    """The module's database without orders: quicker than a new one for each test."""
    delete_rows(superuser)
    return module_database


@pytest.fixture
def postgres(emptied: Database) -> Iterator[PostgresOrderRepository]:
    with connect(emptied.writer_url) as repository:
        yield repository


@pytest.fixture
def writer(postgres: PostgresOrderRepository) -> OrderRepository:
    """Another program's repository, for ``StreamContract``."""
    return postgres


@pytest.fixture
def delete(emptied: Database) -> Callable[[str], None]:
    """Delete an order as another program would, for ``StreamContract``."""

    def delete_order(order_uid: str) -> None:
        with psycopg.connect(emptied.writer_url) as connection:
            connection.execute("DELETE FROM orders WHERE order_uid = %s", [order_uid])

    return delete_order


class KafkaRecords:
    """Handles the records of a topic in the database, as the consumer does. See ``Records``."""

    def __init__(self, database: Database, *, topic: str = "orders", topic_id: str = "topic-id") -> None:
        self._store = ConsumerStore(database.writer_url, "tests", time.monotonic)
        self._topic, self._topic_id = topic, topic_id
        self._next_offsets: dict[int, int] = {}

    def begin(self, next_offset: int, *, partition: int = 0) -> None:
        key = TopicPartition(self._topic, partition)
        started = self._store.start_partitions({self._topic: self._topic_id}, {key: next_offset})
        self._next_offsets[partition] = started[key]

    def handle(self, *, partition: int = 0, error: RejectedError | None = None, value: bytes = b"{") -> None:
        offset = self._next_offsets[partition]
        self._next_offsets[partition] = offset + 1
        record = Record(
            position=RecordPosition(topic_id=self._topic_id, partition=partition, offset=offset),
            time=dt.datetime(2026, 1, 1, tzinfo=dt.UTC),
            topic=self._topic,
            key=None,
            value=value,
        )
        batch = Batch(
            topic_ids={self._topic: self._topic_id},
            ranges={
                TopicPartition(self._topic, partition): OffsetRange(expected_offset=offset, next_offset=offset + 1)
            },
            classified=() if error is None else ((record, Reject.of(record, error)),),
        )
        self._store.write(batch, lambda _: None)

    def close(self) -> None:
        self._store.close()


@pytest.fixture
def records(emptied: Database) -> Iterator[KafkaRecords]:
    records = KafkaRecords(emptied)
    yield records
    records.close()


class TestPostgresOrderRepository(RepositoryContract, StreamContract, PositionContract):
    @pytest.fixture
    def repository(self, postgres: PostgresOrderRepository) -> OrderRepository:
        return postgres


class TestAsyncPostgresOrderRepository(RepositoryContract, StreamContract, PositionContract):
    @pytest.fixture
    def repository(self, emptied: Database) -> Iterator[OrderRepository]:
        with event_loop() as run:
            repository = connect_async(emptied.writer_url)
            yield over_asyncio(repository, run)
            run(repository.close())


class TestUsing(RepositoryContract, PositionContract):
    """In READ COMMITTED, the default of PostgreSQL."""

    @pytest.fixture
    def repository(self, emptied: Database) -> Iterator[OrderRepository]:
        with psycopg.connect(emptied.writer_url) as connection:
            yield orderlib.using(connection)

    def test_a_stream_needs_one_snapshot(self, repository: OrderRepository) -> None:
        repository.save(SAMPLE_ORDER)
        with pytest.raises(ConfigurationError, match=r"stream\(\) .* needs ISOLATION LEVEL REPEATABLE READ"):
            next(repository.stream())
        assert repository.get(SAMPLE_ORDER.order_uid) == SAMPLE_ORDER


class TestUsingInOneSnapshot(RepositoryContract, StreamContract):
    """In REPEATABLE READ."""

    @pytest.fixture
    def repository(self, emptied: Database) -> Iterator[OrderRepository]:
        with psycopg.connect(emptied.writer_url) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            yield orderlib.using(connection)

    def test_a_wait_needs_new_snapshots(self, repository: OrderRepository) -> None:
        repository.save(SAMPLE_ORDER)
        with pytest.raises(ConfigurationError, match=r"wait_until_handled\(\) .* needs ISOLATION LEVEL READ COMMITTED"):
            repository.wait_until_handled("orders", 0, 0, timeout_s=0)
        assert repository.get(SAMPLE_ORDER.order_uid) == SAMPLE_ORDER


@contextlib.contextmanager
def using_async_over_asyncio(url: str, isolation_level: psycopg.IsolationLevel | None) -> Iterator[OrderRepository]:
    with event_loop() as run:
        connection = run(psycopg.AsyncConnection.connect(url))
        run(connection.set_isolation_level(isolation_level))
        yield over_asyncio(orderlib.using_async(connection), run)
        run(connection.close())


class TestUsingAsync(TestUsing):
    @pytest.fixture
    def repository(self, emptied: Database) -> Iterator[OrderRepository]:
        with using_async_over_asyncio(emptied.writer_url, None) as repository:
            yield repository


@pytest.mark.faults  # TestUsingAsync and TestUsingInOneSnapshot have the same parts
class TestUsingAsyncInOneSnapshot(TestUsingInOneSnapshot):
    @pytest.fixture
    def repository(self, emptied: Database) -> Iterator[OrderRepository]:
        with using_async_over_asyncio(emptied.writer_url, psycopg.IsolationLevel.REPEATABLE_READ) as repository:
            yield repository


def with_unchecked(order: Order, **fields: object) -> Order:
    """The order with unchecked values."""
    return unchecked(Order, **{field.name: getattr(order, field.name) for field in attrs.fields(Order)} | fields)


def unchecked_item(**fields: object) -> Item:
    first = SAMPLE_ORDER.items[0]
    return unchecked(Item, **{field.name: getattr(first, field.name) for field in attrs.fields(Item)} | fields)


# Reading while others write


READS: dict[str, Callable[[PostgresOrderRepository], list[Order]]] = {
    "get": lambda repository: [repository.get("a")],
    "get_many": lambda repository: list(repository.get_many(["a", "b"]).values()),
    "list_orders": lambda repository: [stored.order for stored in repository.list_orders().orders],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_reader_never_sees_a_mixture_of_two_versions(
    postgres: PostgresOrderRepository, emptied: Database, read: Callable[[PostgresOrderRepository], list[Order]]
) -> None:
    postgres.save_many([an_order("a", 1), an_order("b", 1)])
    enough = threading.Event()

    def rewrite() -> int:
        version = 1
        while not enough.is_set():
            version += 1
            lines = 1 + version % 5
            postgres.save_many([an_order("a", version, items=lines), an_order("b", version, items=lines)])
        return version

    seen: set[int] = set()
    with connect(emptied.reader_url) as reader, ThreadPoolExecutor(1) as thread:
        writing = thread.submit(rewrite)
        try:
            for _ in range(700):
                versions = set[int]()
                for order in read(reader):
                    [version] = versions_in(order)
                    assert len(order.items) == (1 + version % 5 if version > 1 else 2)
                    versions.add(version)
                # Both orders were saved in one transaction.
                assert len(versions) == 1
                seen |= versions
        finally:
            enough.set()
        assert writing.result() > 10
    assert len(seen) > 10


def test_the_readers_url_suffices_for_reading_and_only_for_that(
    postgres: PostgresOrderRepository, emptied: Database
) -> None:
    postgres.save(SAMPLE_ORDER)
    with connect(emptied.reader_url) as reader:
        assert reader.get(SAMPLE_ORDER.order_uid) == SAMPLE_ORDER
        assert reader.list_orders(customer_id=SAMPLE_ORDER.customer_id).orders[0].order == SAMPLE_ORDER
        assert reader.content_sha256(SAMPLE_ORDER.order_uid) == postgres.content_sha256(SAMPLE_ORDER.order_uid)
        assert reader.stats().stored_recently == 1
        with pytest.raises(ConfigurationError, match="42501"):
            reader.save(an_order("another"))


def test_times_are_read_whatever_time_zone_the_database_prefers(database: Database) -> None:
    name = str(conninfo_to_dict(database.superuser_url)["dbname"])
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute(sql.SQL("ALTER DATABASE {} SET timezone = 'Asia/Kolkata'").format(sql.Identifier(name)))
    with connect(database.writer_url) as repository:
        TestPostgresOrderRepository().test_orders_at_the_edges_of_the_contract_are_read_back_as_they_were_saved(
            repository
        )


def test_texts_are_sent_in_utf8_whatever_the_environment_prefers(
    emptied: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    order = attrs.evolve(an_order("a"), internal_signature="ключ \U0001f600")
    with connect(emptied.writer_url) as repository:
        repository.save(order)
        assert repository.get("a") == order


# What PostgreSQL refuses


@pytest.mark.parametrize(
    ("bad", "sqlstate"),
    [
        (with_unchecked(an_order("bad"), customer_id=""), "23514"),
        (with_unchecked(an_order("bad"), sm_id=-1), "23514"),
        (with_unchecked(an_order("bad"), items=(unchecked_item(sale=101),)), "23514"),
        (with_unchecked(an_order("bad"), items=(SAMPLE_ORDER.items[0], unchecked_item(name="secret\0"))), "22021"),
        (with_unchecked(an_order("bad"), items=SAMPLE_ORDER.items * 501), "23514"),
    ],
    ids=["empty", "negative", "item", "nul", "items"],
)
def test_an_order_that_only_postgresql_refuses_is_named_and_nothing_is_stored(
    postgres: PostgresOrderRepository, bad: Order, sqlstate: str
) -> None:
    with pytest.raises(RefusedByDatabase) as refusal:
        postgres.save_many([an_order("good"), *(an_order(f"{index}") for index in range(20)), bad, an_order("after")])
    assert (refusal.value.order_uid, refusal.value.sqlstate) == ("bad", sqlstate)
    assert [fault.path for fault in refusal.value.faults] == ["$"]
    assert "secret" not in str(refusal.value)
    assert postgres.list_orders().orders == ()


# Writers that meet


def test_concurrent_replacements_end_with_every_order_whole(emptied: Database) -> None:
    """More writers than the suite has, each on a connection of its own, over few orders: collisions are the rule."""

    def save(version: int) -> Counter[Outcome]:
        with connect(emptied.writer_url, max_connections=1) as repository:
            outcomes: Counter[Outcome] = Counter()
            for step in range(8):
                # In an order of its own, so that row locks are taken crosswise.
                chosen = "abcdef"[step % 6 :] + "abcdef"[: step % 6]
                chosen = chosen if version % 2 else chosen[::-1]
                outcomes += repository.save_many(an_order(uid, 100 * version + step, items=version) for uid in chosen)
            return outcomes

    with ThreadPoolExecutor(6) as threads:
        outcomes = sum(threads.map(save, range(1, 7)), Counter[Outcome]())
    assert outcomes == Counter({Outcome.STORED: 6 * 8 * 6})
    with connect(emptied.reader_url) as reader:
        found = reader.get_many(list("abcdef"))
        assert found.keys() == set("abcdef")
        for order in found.values():
            [version] = versions_in(order)
            assert len(order.items) == version // 100
    with psycopg.connect(emptied.superuser_url) as superuser:
        counts = superuser.execute(
            "SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM delivery), (SELECT count(*) FROM payment)"
        ).fetchone()
        assert counts == (6, 6, 6)
        gaps = superuser.execute(
            "SELECT order_uid FROM items GROUP BY order_uid HAVING max(line) <> count(*) - 1 OR min(line) <> 0"
        ).fetchall()
        assert gaps == []


# What happened to a record


@pytest.mark.parametrize(
    ("value", "outcome", "expected"),
    [
        (encode_order(SAMPLE_ORDER), Outcome.STORED, HANDLED),
        (
            b"[",
            Outcome.REJECTED,
            PositionState(
                state=RecordState.REJECTED,
                code="invalid_order",
                faults=REJECTION.faults,
                total_faults=REJECTION.total,
            ),
        ),
    ],
    ids=["stored", "rejected"],
)
def test_a_redriven_record_is_handled_unless_it_is_rejected_again(
    postgres: PostgresOrderRepository,
    emptied: Database,
    records: KafkaRecords,
    value: bytes,
    outcome: Outcome,
    expected: PositionState,
) -> None:
    records.begin(0)
    records.handle(error=REJECTION, value=value)
    assert postgres.position_state("orders", 0, 0) == REJECTED
    with connections.open_connection(emptied.writer_url, application_name="tests") as connection:
        assert sum(redrive(connection, 10_000), Counter()) == Counter({outcome: 1})
    assert postgres.position_state("orders", 0, 0) == expected


def test_a_position_belongs_to_the_topic_that_was_read_last(
    postgres: PostgresOrderRepository, emptied: Database, records: KafkaRecords
) -> None:
    records.begin(0)
    for _ in range(3):
        records.handle(error=REJECTION)
    with contextlib.closing(KafkaRecords(emptied, topic_id="recreated")) as recreated:
        recreated.begin(0)
        assert postgres.position_state("orders", 0, 0) == WAITING
        recreated.handle()
        assert postgres.position_state("orders", 0, 0) == HANDLED
        assert postgres.position_state("orders", 0, 1) == WAITING


def test_a_reader_sees_why_a_record_was_rejected_and_nothing_of_the_record(
    emptied: Database, records: KafkaRecords
) -> None:
    records.begin(0)
    records.handle(error=REJECTION)
    with connect(emptied.reader_url) as reader:
        assert reader.position_state("orders", 0, 0) == REJECTED
        assert reader.wait_until_handled("orders", 0, 0, timeout_s=0) == REJECTED
    with psycopg.connect(emptied.reader_url) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("SELECT value FROM rejects")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_wait_goes_on_through_an_outage(emptied: Database, records: KafkaRecords, is_async: bool) -> None:
    records.begin(0)
    with TcpProxy(emptied.reader_url) as proxy, pool(proxy.url, is_async=is_async) as repository:
        assert repository.position_state("orders", 0, 0) == WAITING
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(repository.wait_until_handled, "orders", 0, 0, timeout_s=30)
            proxy.cut()
            time.sleep(0.5)
            records.handle(error=REJECTION)
            assert not waiting.done()
            proxy.mend()
            assert waiting.result(10) == REJECTED


@pytest.mark.parametrize("is_async", [False, True])
def test_a_wait_whose_outage_lasts_is_unavailable(emptied: Database, records: KafkaRecords, is_async: bool) -> None:
    records.begin(0)
    with TcpProxy(emptied.reader_url) as proxy, pool(proxy.url, is_async=is_async) as repository:
        assert repository.position_state("orders", 0, 0) == WAITING
        proxy.cut()
        with pytest.raises(DatabaseUnavailable):
            repository.wait_until_handled("orders", 0, 0, timeout_s=0.5)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_wait_without_an_answer_ends_at_its_own_timeout(
    emptied: Database, records: KafkaRecords, is_async: bool
) -> None:
    records.begin(0)
    with TcpProxy(emptied.reader_url) as proxy, pool(proxy.url, is_async=is_async, timeout_s=60) as repository:
        assert repository.position_state("orders", 0, 0) == WAITING
        proxy.freeze()
        started_s = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            repository.wait_until_handled("orders", 0, 0, timeout_s=0.2)
        assert time.monotonic() - started_s < 30, "it waited as long as a call may take"


def test_a_wait_on_a_lost_connection_of_the_caller_ends_at_once(emptied: Database, records: KafkaRecords) -> None:
    records.begin(0)
    with psycopg.connect(emptied.reader_url) as connection, psycopg.connect(emptied.superuser_url) as superuser:
        repository = orderlib.using(connection)
        assert repository.position_state("orders", 0, 0) == WAITING
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(repository.wait_until_handled, "orders", 0, 0, timeout_s=30)
            time.sleep(0.1)
            superuser.execute("SELECT pg_terminate_backend(%s::integer)", [connection.info.backend_pid])
            with pytest.raises(DatabaseUnavailable):
                waiting.result(5)


@contextlib.contextmanager
def pool(url: str, *, is_async: bool, timeout_s: float = 1) -> Iterator[OrderRepository]:
    """A repository with its own pool, and this time for each call."""
    if not is_async:
        with connect(url, timeout_s=timeout_s) as repository:
            yield repository
        return
    with event_loop() as run:
        async_repository = connect_async(url, timeout_s=timeout_s)
        yield over_asyncio(async_repository, run)
        run(async_repository.close())


# All orders

STREAM_ALL = """
import os, resource, sys
import orderlib
with orderlib.connect(os.environ["ORDERS_READER_URL"]) as repository:
    count = sum(1 for stored in repository.stream(customer_id=sys.argv[1]))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_memory_of_a_stream_does_not_depend_on_the_number_of_orders(database: Database) -> None:
    """Also not the memory of libpq, so the kernel measures it. 9,000 orders in Python take more than 50 MB."""
    with connect(database.writer_url, timeout_s=60) as repository:
        for start in range(0, 10_000, 2_000):
            repository.save_many(
                an_order(f"{index:05}", customer_id="few" if index < 1_000 else "many")
                for index in range(start, start + 2_000)
            )

    def count_and_kib(customer_id: str) -> tuple[int, int]:
        done = subprocess.run(
            [sys.executable, "-c", STREAM_ALL, customer_id],
            env=os.environ | database.environ(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        count, kib = done.stdout.split()
        return int(count), int(kib)

    (few, few_kib), (many, many_kib) = count_and_kib("few"), count_and_kib("many")
    assert (few, many) == (1_000, 9_000)
    assert many_kib - few_kib < 10_000


@pytest.mark.parametrize("is_async", [False, True])
def test_an_outage_ends_a_stream_and_a_new_one_works(emptied: Database, is_async: bool) -> None:
    with connect(emptied.writer_url) as writer:
        writer.save_many(an_order(f"{index}", items=1) for index in range(STREAM_SIZE + 1))
    with TcpProxy(emptied.reader_url) as proxy, pool(proxy.url, is_async=is_async) as repository:
        stream = repository.stream()
        next(stream)
        proxy.cut()
        with pytest.raises(DatabaseUnavailable):
            list(stream)
        proxy.mend()
        assert until_available(lambda: len(list(repository.stream()))) == STREAM_SIZE + 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_whose_session_is_lost_never_continues_in_another_snapshot(emptied: Database, is_async: bool) -> None:
    """Although PostgreSQL accepts connections again, and a read of one order would be repeated."""
    with connect(emptied.writer_url) as writer:
        writer.save_many(an_order(f"{index}", items=1) for index in range(STREAM_SIZE + 1))
    with TcpProxy(emptied.reader_url) as proxy, pool(proxy.url, is_async=is_async) as repository:
        repository.count()
        stream = repository.stream()
        next(stream)
        proxy.cut()
        proxy.mend()
        with pytest.raises(DatabaseUnavailable):
            list(stream)


# Outages


def test_a_server_that_is_gone_is_unavailable_and_comes_back_by_itself(emptied: Database) -> None:
    with TcpProxy(emptied.writer_url) as proxy, connect(proxy.url, timeout_s=1) as repository:
        repository.save(an_order("a", 1))
        proxy.cut()
        for call in (lambda: repository.get("a"), repository.list_orders, lambda: repository.save(an_order("a", 2))):
            with pytest.raises(DatabaseUnavailable):
                call()
        proxy.mend()
        assert until_available(lambda: repository.save(an_order("a", 3))) is Outcome.STORED
        assert versions_in(repository.get("a")) == {3}


def until_available(call: Callable[[], T]) -> T:
    """The result of a call once the pool has found its way back; it waits longer after each failure."""
    for _ in range(30):
        try:
            return call()
        except DatabaseUnavailable:
            continue
    raise AssertionError("the server is back, and was not found")


def test_a_connection_that_the_server_ended_is_replaced(postgres: PostgresOrderRepository, emptied: Database) -> None:
    postgres.save(an_order("a"))
    with psycopg.connect(emptied.superuser_url, autocommit=True) as superuser:
        superuser.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'orders_writer'")
    assert until_available(lambda: postgres.get("a")) == an_order("a")


def test_a_refused_connection_is_an_outage(emptied: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DatabaseUnavailable) as refusal:
        connect(make_conninfo(emptied.writer_url, port=port))
    assert str(conninfo_to_dict(emptied.writer_url)["password"]) not in str(refusal.value)


# Configuration errors


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"password": "wrong-secret"}, "password authentication failed"),
        ({"dbname": "no_such_database"}, 'database "no_such_database" does not exist'),
        ({"user": "no_such_role"}, "password authentication failed"),
    ],
)
def test_a_url_that_leads_nowhere_is_a_configuration_error(
    emptied: Database, change: dict[str, str], expected: str
) -> None:
    with pytest.raises(ConfigurationError, match=expected) as refusal:
        connect(make_conninfo(emptied.writer_url, **change))
    assert "wrong-secret" not in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("url", ["secret", "postgresql://user:secret@[::1/orders", "password=secret nonsense=1"])
def test_a_url_that_is_none_is_not_quoted(url: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        connect(url)
    assert "secret" not in str(refusal.value)


def test_a_database_without_the_schema_is_a_configuration_error_that_names_the_command(
    empty_database: Database,
) -> None:
    with pytest.raises(ConfigurationError, match=r"python -m orderlib migrate"):
        connect(empty_database.superuser_url)


def test_a_schema_that_is_older_than_the_program_is_a_configuration_error(database: Database) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("DELETE FROM schema_migrations WHERE number = (SELECT max(number) FROM schema_migrations)")
    with pytest.raises(
        ConfigurationError, match=r"schema is at migration .*, but this program needs .*python -m orderlib migrate"
    ):
        connect(database.reader_url)


def test_a_schema_that_is_newer_than_the_program_is_fine(database: Database) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("INSERT INTO schema_migrations (number, name) VALUES (9999, 'of a later release')")
    with connect(database.reader_url) as repository, pytest.raises(OrderNotFound):
        repository.get("a")


def test_a_missing_table_is_a_configuration_error(database: Database) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("DROP TABLE items")
    with connect(database.writer_url) as repository, pytest.raises(ConfigurationError, match="42P01"):
        repository.get("a")


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("cursor", [False, True])
@pytest.mark.parametrize(
    ("customer", "track", "index"),
    [
        (False, False, "orders_newest"),
        (True, False, "orders_newest_of_customer"),
        (False, True, "orders_newest_of_track"),
    ],
)
@pytest.mark.parametrize("times", [False, True])
def test_a_page_is_read_along_its_index_and_never_sorted(
    module_database: Database, direction: Direction, cursor: bool, customer: bool, track: bool, index: str, times: bool
) -> None:
    """A page costs the same for any number of orders. A period limits the part of the index that is read."""
    used = {"customer_id": customer, "track_number": track, "since": times, "until": times}
    filters = [name for name, is_used in used.items() if is_used]
    statement = queries.list_orders(direction, filters, cursor=cursor)
    # With so few rows, another of these indexes with a filter may be cheaper.
    others = {"orders_newest", "orders_newest_of_customer", "orders_newest_of_track"} - {index}
    plan = plan_by_index(module_database, statement, *others)
    assert any(f"using {index} on orders" in line for line in plan), plan
    assert not any("Sort" in line for line in plan), plan
    if times:
        [condition] = [line for line in plan if "Index Cond" in line and "first_stored_at" in line]
        assert "first_stored_at >=" in condition, plan
        assert "first_stored_at < $" in condition, plan


def test_the_items_of_a_page_are_read_along_their_index_and_never_sorted(module_database: Database) -> None:
    """With a sort, each page of a stream would scan the whole table until it has statistics."""
    plan = plan_by_index(module_database, queries.GET_ITEMS_OF_PAGE)
    assert any("using items_pkey on items" in line for line in plan), plan
    assert not any("Sort" in line for line in plan), plan


def test_the_items_of_a_page_are_counted_by_one_step_in_their_index_for_each_order(module_database: Database) -> None:
    plan = plan_by_index(module_database, queries.COUNT_ITEMS)
    assert any("Index Only Scan Backward using items_pkey on items" in line for line in plan), plan
    assert not any("Seq Scan" in line for line in plan), plan


@pytest.mark.parametrize(
    ("large", "statements"), [(0, PAGE_STATEMENTS), (4, PAGE_STATEMENTS), (5, LONG_PAGE_STATEMENTS)]
)
def test_a_page_costs_two_queries_and_three_more_if_its_items_do_not_fit(
    emptied: Database, large: int, statements: int
) -> None:
    with connect(emptied.writer_url) as writer:
        writer.save_many(an_order(f"a-{index:02}") for index in range(95))
        writer.save_many(an_order(f"b-{index}", items=1_000) for index in range(large))
    with TcpProxy(emptied.reader_url) as proxy, connect(proxy.url) as repository:
        before = proxy.executed
        assert len(repository.list_orders(limit=100).orders) == (95 + large if large < 5 else 4)
        assert proxy.executed - before == statements


def plan_by_index(database: Database, statement: LiteralString, *dropped: str) -> list[str]:
    """The plan of a statement if an index serves its conditions and its order, and the ``dropped`` ones do not exist.

    Autovacuum may have collected statistics of the few rows here, with which another plan is cheaper.
    """
    with psycopg.connect(database.superuser_url) as superuser, superuser.transaction(force_rollback=True):
        superuser.execute("DELETE FROM pg_statistic")
        for table in ("orders", "delivery", "payment", "items"):
            superuser.execute("SELECT pg_clear_relation_stats('public', %s)", [table])
        for index in dropped:
            superuser.execute(sql.SQL("DROP INDEX {}").format(sql.Identifier(index)))
        superuser.execute("SET enable_seqscan = off")
        superuser.execute("SET enable_sort = off")
        return [line for (line,) in superuser.execute(sql.SQL("EXPLAIN (GENERIC_PLAN) ") + sql.SQL(statement))]
