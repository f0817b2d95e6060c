"""A real hot standby: reads, the replication delay, recovery conflicts, and writes before and after its promotion."""

from __future__ import annotations

import asyncio
import datetime as dt
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import attrs
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import orderlib
from orderlib import DatabaseUnavailable, Order, Outcome
from orderlib.ingestion.records import TopicPartition
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.testing import SAMPLE as SAMPLE_JSON
from sandbox.postgres import PostgresServer
from tests.support.api_process import Service, serving, settings_for
from tests.support.databases import on_server, set_up
from tests.support.programs import succeed
from tests.support.sending import Sender
from tests.support.standby import QuietPostgres, Standby
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
UID = SAMPLE.order_uid
WITHIN_S = 20.0
#: The advisory lock at which a slowed read waits.
GATE = 4711


def slowed(url: str) -> str:
    """Return the URL for reads of items that wait at the gate."""
    return make_conninfo(url, options="-c search_path=slowed,public")


@pytest.fixture(scope="module")
def primary() -> Iterator[PostgresServer]:
    with QuietPostgres() as server:
        urls = on_server(server)
        set_up(urls)
        with psycopg.connect(urls.superuser_url, autocommit=True) as connection:
            connection.execute("CREATE TABLE scratch (number int)")
            connection.execute("CREATE SCHEMA slowed")
            connection.execute(
                "CREATE VIEW slowed.items AS SELECT i.* FROM "
                f"(SELECT pg_advisory_xact_lock_shared({GATE}) OFFSET 0) gate, public.items i"
            )
            connection.execute("GRANT USAGE ON SCHEMA slowed TO orders_reader")
            connection.execute("GRANT SELECT ON slowed.items TO orders_reader")
        with orderlib.connect(urls.writer_url) as repository:
            repository.save(SAMPLE)
        yield server


@pytest.fixture(scope="module")
def standby(primary: PostgresServer) -> Iterator[Standby]:
    with Standby(primary) as server:
        wait_for(lambda: server.execute("SELECT 1 FROM pg_stat_wal_receiver") == [(1,)], WITHIN_S)
        yield server


@pytest.fixture(scope="module")
def api(standby: Standby) -> Iterator[Service]:
    with serving(settings_for(on_server(standby).reader_url)) as service:
        yield service


def save(primary: PostgresServer, order_uid: str) -> None:
    with orderlib.connect(on_server(primary).writer_url) as repository:
        assert repository.save(attrs.evolve(SAMPLE, order_uid=order_uid)) is Outcome.STORED


def delay_of(server: PostgresServer) -> float | None:
    with orderlib.connect(on_server(server).reader_url) as repository:
        return repository.stats().replication_delay_s


def shown_delay(api: Service) -> float:
    answer = api.get("/readyz")
    assert answer.status == 200
    assert answer.json.keys() == {"status", "replication_delay_s"}
    return float(answer.json["replication_delay_s"])


@contextmanager
def paused(standby: Standby) -> Iterator[None]:
    standby.execute("SELECT pg_wal_replay_pause()")
    wait_for(lambda: standby.execute("SELECT pg_get_wal_replay_pause_state()") == [("paused",)], WITHIN_S)
    try:
        yield
    finally:
        standby.execute("SELECT pg_wal_replay_resume()")


# Reads and the replication delay


def test_a_primary_has_no_replication_delay(primary: PostgresServer) -> None:
    assert delay_of(primary) is None


def test_a_standby_serves_reads_and_shows_its_delay(primary: PostgresServer, standby: Standby, api: Service) -> None:
    with orderlib.connect(on_server(standby).reader_url) as repository:
        assert repository.get(UID) == SAMPLE
        wait_for(lambda: repository.stats().replication_delay_s == 0, WITHIN_S)
        assert orderlib.decode_order(api.get(f"/orders/{UID}").body) == SAMPLE
        save(primary, "before")
        wait_for(lambda: api.get("/orders/before").status == 200, WITHIN_S)
        wait_for(lambda: shown_delay(api) == 0, WITHIN_S)
        with paused(standby):
            save(primary, "during")
            wait_for(lambda: shown_delay(api) > 0, WITHIN_S)
            earlier = shown_delay(api)
            wait_for(lambda: shown_delay(api) > earlier + 0.5, WITHIN_S)
            delay_s = repository.stats().replication_delay_s
            assert delay_s is not None
            assert delay_s > earlier + 0.5
            assert api.get("/orders/during").status == 404
        wait_for(lambda: shown_delay(api) == 0, WITHIN_S)
        assert api.get("/orders/during").status == 200
        assert repository.stats().replication_delay_s == 0


def test_a_standby_that_lost_its_primary_does_not_report_a_delay_of_zero(
    primary: PostgresServer, standby: Standby, api: Service
) -> None:
    """It has replayed everything that it received, but does not know what it misses."""
    wait_for(lambda: shown_delay(api) == 0, WITHIN_S)
    primary.stop()
    try:
        wait_for(lambda: shown_delay(api) > 0, WITHIN_S)
        earlier = shown_delay(api)
        wait_for(lambda: shown_delay(api) > earlier, WITHIN_S)
        assert api.get(f"/orders/{UID}").status == 200
    finally:
        primary.start()
    wait_for(lambda: shown_delay(api) == 0, WITHIN_S)
    wait_for(lambda: standby.execute("SELECT 1 FROM pg_stat_wal_receiver") == [(1,)], WITHIN_S)


def test_a_standby_that_receives_nothing_and_replayed_nothing_counts_from_its_checkpoint(standby: Standby) -> None:
    """Without streaming it has no received position, and after a restart no replayed transaction."""
    # A restart point, so that nothing is left to replay.
    standby.execute("CHECKPOINT")
    standby.stop()
    standby.streams = False
    standby.start()
    try:
        [(received, checkpoint)] = standby.execute(
            "SELECT pg_last_wal_receive_lsn(), checkpoint_time FROM pg_control_checkpoint()"
        )
        assert received is None
        assert isinstance(checkpoint, dt.datetime)
        delay_s = delay_of(standby)
        assert delay_s is not None
        assert 0 < delay_s <= (dt.datetime.now(dt.UTC) - checkpoint).total_seconds()
    finally:
        standby.stop()
        standby.streams = True
        standby.start()
    wait_for(lambda: delay_of(standby) == 0, WITHIN_S)


# Recovery conflicts


def get(url: str) -> Order:
    with orderlib.connect(url, timeout_s=60) as repository:
        return repository.get(UID)


def get_async(url: str) -> Order:
    async def read() -> Order:
        async with orderlib.connect_async(url, timeout_s=60, connection_timeout_s=30) as reader:
            return await reader.get(UID)

    return asyncio.run(read())


def remove_rows(primary: PostgresServer) -> None:
    """Remove rows that the snapshot of a read on the standby still sees."""
    with psycopg.connect(primary.superuser_url, autocommit=True) as connection:
        connection.execute("INSERT INTO scratch VALUES (1)")
        connection.execute("DELETE FROM scratch")
        connection.execute("VACUUM scratch")


def lock_items(primary: PostgresServer) -> None:
    """Lock a table that a read on the standby uses, as DDL does."""
    with psycopg.connect(primary.superuser_url) as connection:
        connection.execute("LOCK TABLE public.items IN ACCESS EXCLUSIVE MODE")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize(
    ("read", "conflict", "counter"),
    [(get, remove_rows, "confl_snapshot"), (get_async, remove_rows, "confl_snapshot"), (get, lock_items, "confl_lock")],
)
def test_a_read_survives_one_recovery_conflict(
    primary: PostgresServer,
    standby: Standby,
    read: Callable[[str], Order],
    conflict: Callable[[PostgresServer], None],
    counter: str,
    times: int,
) -> None:
    waiting = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

    def conflicts() -> object:
        [(count,)] = standby.execute(
            f"SELECT {counter} FROM pg_stat_database_conflicts WHERE datname = current_database()"
        )
        return count

    # Otherwise an earlier conflict may still be replayed.
    wait_for(lambda: delay_of(standby) == 0, WITHIN_S)
    before = conflicts()
    assert isinstance(before, int)
    seen: set[object] = set()

    def reads_again(result: Future[Order]) -> bool:
        """Whether a session that was not seen yet waits at the gate."""
        assert not result.done(), result.result()
        found = [pid for (pid,) in standby.execute(waiting) if pid not in seen]
        seen.update(found)
        return bool(found)

    with ThreadPoolExecutor() as threads:
        with psycopg.connect(standby.superuser_url, autocommit=True) as gate:
            gate.execute("SELECT pg_advisory_lock(%s)", [GATE])
            result = threads.submit(read, slowed(on_server(standby).reader_url))
            for _ in range(times):
                wait_for(lambda: reads_again(result), WITHIN_S)
                conflict(primary)
            if times == 1:
                wait_for(lambda: reads_again(result), WITHIN_S)
            else:
                with pytest.raises(DatabaseUnavailable, match="40001"):
                    result.result(WITHIN_S)
        # The gate is open.
        if times == 1:
            assert result.result(WITHIN_S) == SAMPLE
    wait_for(lambda: conflicts() == before + times, WITHIN_S)


# Writes


def test_a_write_on_a_standby_is_an_outage_that_ends_with_its_promotion(primary: PostgresServer) -> None:
    order = attrs.evolve(SAMPLE, order_uid="written")
    with psycopg.connect(primary.superuser_url) as connection:
        connection.execute("DELETE FROM consumer_offsets")
        connection.execute("DELETE FROM consumer_groups")
    with Standby(primary) as standby, orderlib.connect(on_server(standby).writer_url) as repository:
        store = ConsumerStore(on_server(standby).writer_url, "tests", time.monotonic)
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable, match="25006"):
                repository.save(order)
            with pytest.raises(DatabaseUnavailable, match="25006"):
                store.claim_database()
        assert repository.get(UID) == SAMPLE
        standby.execute("SELECT pg_promote()")
        assert repository.save(order) is Outcome.STORED
        store.claim_database()
        partition = TopicPartition("orders", 0)
        assert store.start_partitions({"orders": "AAAAAAAAAAAAAAAAAAAAAQ"}, {partition: 0}) == {partition: 0}
        assert repository.stats().replication_delay_s is None
        store.close()


# URLs with several hosts


@pytest.mark.parametrize(
    "first", ["read-only", *(pytest.param(name, marks=pytest.mark.faults) for name in ("silent", "refusing"))]
)
def test_every_program_finds_the_primary_behind_another_host(
    first: str, primary: PostgresServer, standby: Standby, environ: dict[str, str], topic: str
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port = standby.port if first == "read-only" else listener.getsockname()[1]
        if first == "refusing":
            listener.close()
        hosts = {"host": "127.0.0.1,127.0.0.1", "port": f"{port},{primary.port}", "target_session_attrs": "read-write"}
        urls = {name: make_conninfo(url, **hosts) for name, url in on_server(primary).environ().items()}
        environ = {**environ, **urls}
        sender = Sender(environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], topic)
        sender.send_orders([f"{first}-order"])
        for command in ("bootstrap", "migrate"):
            succeed(f"admin {command}", environ)
        succeed("consumer --exit-at-end", environ)
        assert first in succeed(f"admin get {first}-order", environ)
        with serving(environ) as service:
            assert service.get(f"/orders/{first}-order").status == 200
        succeed(f"admin forget {first}-order --yes", environ)
        with orderlib.connect(urls["ORDERS_DATABASE_URL"]) as repository:
            assert repository.save(attrs.evolve(SAMPLE, order_uid=f"{first}-save")) is Outcome.STORED


def test_a_consumer_that_reached_a_standby_looks_for_the_primary_again(
    primary: PostgresServer, standby: Standby
) -> None:
    """Without target_session_attrs, it may find the standby first: then the next attempt connects anew."""
    with TcpProxy(on_server(primary).writer_url) as wire:
        ports = f"{conninfo_to_dict(wire.url)['port']},{standby.port}"
        url = make_conninfo(wire.url, host="127.0.0.1,127.0.0.1", port=ports)
        store = ConsumerStore(url, "order-consumer", time.monotonic)
        store.claim_database()
        partition = TopicPartition("orders", 0)
        new = {"orders": "BBBBBBBBBBBBBBBBBBBBBQ"}, {partition: 3}
        wire.cut()
        for _ in range(2):
            with pytest.raises(DatabaseUnavailable, match="25006"):
                store.start_partitions(*new)
        wire.mend()
        assert store.start_partitions(*new) == {partition: 3}
        store.close()
