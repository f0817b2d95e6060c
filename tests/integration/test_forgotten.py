"""A forgotten order is never stored again, in whatever way it arrives."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import attrs
import psycopg
import pytest

import orderlib
from orderlib import Order, Outcome, decode_order, encode_order
from orderlib.codecs import is_order_uid
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.operations import (
    Forgotten,
    count_unchecked_rejects,
    forget,
    forget_again,
    forget_customer,
    forgotten,
)
from orderlib.postgres.reject_list import RejectQuery
from orderlib.postgres.rejects import list_rejects, redrive
from orderlib.testing import SAMPLE
from tests.support.batches import batch, consumer_store, ignore
from tests.support.databases import Database

ORDER = decode_order(SAMPLE)
OTHER = attrs.evolve(ORDER, order_uid="other", customer_id="other")
UID = ORDER.order_uid


@pytest.fixture
def store(database: Database) -> Iterator[ConsumerStore]:
    with consumer_store(database) as store:
        yield store


@pytest.fixture
def migrator(database: Database) -> Iterator[psycopg.Connection]:
    with open_connection(database.migrator_url, application_name="tests") as connection:
        yield connection


def counts(database: Database) -> tuple[int, ...]:
    with psycopg.connect(database.superuser_url) as superuser:
        row = superuser.execute("SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM rejects)").fetchone()
        assert row is not None
        return row


def newer(order: Order) -> bytes:
    return encode_order(attrs.evolve(order, sm_id=order.sm_id + 1))


def test_no_way_of_storing_brings_a_forgotten_order_back(
    database: Database, store: ConsumerStore, migrator: psycopg.Connection
) -> None:
    key = UID.encode()
    store.write(batch(0, (key, SAMPLE), (key, b"[")), ignore)
    assert counts(database) == (1, 1)
    assert forget(migrator, UID) == Forgotten(order_uids=1, orders=1, rejects=1)
    assert counts(database) == (0, 0)

    # A replay, a late sender, and an invalid record of the same key; the neighbour is stored.
    contents = (key, SAMPLE), (key, b"["), (None, newer(ORDER)), (b"other", encode_order(OTHER))
    written = store.write(batch(2, *contents), ignore)
    assert +written.outcomes == Counter({Outcome.FORGOTTEN: 3, Outcome.STORED: 1})
    with orderlib.connect(database.writer_url) as repository:
        assert repository.save(ORDER) is Outcome.FORGOTTEN
        assert repository.save_many([ORDER, OTHER]) == Counter({Outcome.FORGOTTEN: 1, Outcome.DUPLICATE: 1})
    with psycopg.connect(database.writer_url) as connection:
        assert orderlib.using(connection).save(ORDER) is Outcome.FORGOTTEN
    assert counts(database) == (1, 0)


@pytest.mark.parametrize("uid", ["", "..", "no such uid !"])
def test_what_no_order_may_have_as_its_order_uid_is_not_forgotten(
    database: Database, migrator: psycopg.Connection, uid: str
) -> None:
    with pytest.raises(ValueError, match="no order may have this order_uid"):
        forget(migrator, uid)
    with open_connection(database.reader_url, application_name="tests") as reader:
        assert forgotten(reader) == []


def test_a_reject_without_a_key_is_not_redriven_into_a_forgotten_order(
    database: Database, store: ConsumerStore, migrator: psycopg.Connection
) -> None:
    refused = batch(0, (None, b"["))
    store.write(refused, ignore)
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute("UPDATE rejects SET value = %s", [SAMPLE])
    assert forget(migrator, UID) == Forgotten(order_uids=1, orders=0, rejects=0)
    with open_connection(database.writer_url, application_name="tests") as writer:
        assert sum(redrive(writer, 10_000), Counter()) == Counter({Outcome.FORGOTTEN: 1})
        assert list(redrive(writer, 10_000)) == []
    assert counts(database) == (0, 1)


def test_rejects_whose_key_is_no_order_uid_are_counted_and_listed(
    database: Database, store: ConsumerStore, migrator: psycopg.Connection
) -> None:
    order_uids = [b"a", b"...", b"A.b_c:d-9", b"x" * 128]
    others = [None, b"", b".", b"..", b"a\n", b"\n", b"a b", b"\\", b"\\141", "é".encode(), b"\xff", b"\0", b"x" * 129]
    assert all(is_order_uid(key.decode()) for key in order_uids)
    assert not any(is_order_uid(key.decode(errors="replace")) for key in others if key is not None)
    store.write(batch(0, *((key, b"[") for key in (*order_uids, *others))), ignore)
    assert count_unchecked_rejects(migrator) == len(others)
    with open_connection(database.writer_url, application_name="tests") as writer:
        page, total = list_rejects(writer, RejectQuery(without_order_uid=True, limit=100))
    assert total == len(others)
    listed = {reject.position.offset for reject in page.rejects}
    assert listed == set(range(len(order_uids), len(order_uids) + len(others)))


def test_all_orders_of_a_customer_are_forgotten_and_a_restored_backup_is_cleaned_with_the_list(
    database: Database, migrator: psycopg.Connection
) -> None:
    second = attrs.evolve(ORDER, order_uid="second")
    with orderlib.connect(database.writer_url) as repository:
        repository.save_many([ORDER, second, OTHER])
        assert forget_customer(migrator, ORDER.customer_id) == Forgotten(order_uids=2, orders=2, rejects=0)
        with open_connection(database.reader_url, application_name="tests") as reader:
            digests = forgotten(reader)
        assert set(digests) == {hashlib.sha256(uid.encode()).digest() for uid in (UID, "second")}
        with psycopg.connect(database.superuser_url) as superuser:
            superuser.execute("DELETE FROM forgotten")
        repository.save_many([ORDER, second])
        assert forget_again(migrator, digests) == Forgotten(order_uids=2, orders=2, rejects=0)
        assert forget_again(migrator, digests) == Forgotten(order_uids=0, orders=0, rejects=0)
        assert [stored.order.order_uid for stored in repository.stream()] == ["other"]


def test_forget_waits_for_a_write_that_has_begun_and_erases_what_it_stored(database: Database) -> None:
    """Otherwise a batch that saw no forgotten order could store one afterwards."""
    with (
        ThreadPoolExecutor(1) as executor,
        open_connection(database.migrator_url, application_name="tests") as migrator,
    ):
        with psycopg.connect(database.writer_url) as writer:
            assert orderlib.using(writer).save(ORDER) is Outcome.STORED
            forgetting = executor.submit(forget, migrator, UID)
            with psycopg.connect(database.superuser_url, autocommit=True) as observer:
                while not observer.execute(
                    "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                ).fetchall():
                    assert not forgetting.done()
        assert forgetting.result(10) == Forgotten(order_uids=1, orders=1, rejects=0)
    assert counts(database) == (0, 0)


def test_a_write_waits_for_a_forget_that_has_begun_and_stores_nothing(
    database: Database, migrator: psycopg.Connection
) -> None:
    with ThreadPoolExecutor(1) as executor, orderlib.connect(database.writer_url) as repository:
        with migrator.transaction():
            forget(migrator, UID)
            saving = executor.submit(repository.save, ORDER)
            with psycopg.connect(database.superuser_url, autocommit=True) as observer:
                while not observer.execute(
                    "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                ).fetchall():
                    assert not saving.done()
        assert saving.result(10) is Outcome.FORGOTTEN
    assert counts(database) == (0, 0)
