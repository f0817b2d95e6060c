"""With ORDERS_TOMBSTONES=erase, a record with an order_uid as key and no value erases the order."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterator

import attrs
import psycopg
import pytest

import orderlib
from orderlib import Outcome, decode_order, encode_order
from orderlib.ingestion.records import Tombstones
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.operations import forget, forget_again, reset_offsets
from orderlib.postgres.rejects import redrive
from orderlib.testing import SAMPLE
from tests.support.batches import batch, consumer_store, ignore
from tests.support.databases import Database

ORDER = decode_order(SAMPLE)
UID = ORDER.order_uid
KEY = UID.encode()
FIRST, SECOND, THIRD = ((KEY, encode_order(attrs.evolve(ORDER, sm_id=number))) for number in range(3))
UNKNOWN = KEY, SAMPLE.replace(b"{", b'{"later": 1, ', 1)
TOMBSTONE = KEY, None
OTHER = b"other", encode_order(attrs.evolve(ORDER, order_uid="other"))


@pytest.fixture
def store(database: Database) -> Iterator[ConsumerStore]:
    with consumer_store(database) as store:
        yield store


def handle(
    store: ConsumerStore,
    offset: int,
    *contents: tuple[bytes | None, bytes | None],
    tombstones: Tombstones = Tombstones.ERASE,
) -> Counter[Outcome]:
    return +store.write(batch(offset, *contents, tombstones=tombstones), ignore).outcomes


def rewind(database: Database) -> None:
    with open_connection(database.migrator_url, application_name="tests") as connection:
        reset_offsets(connection, "tests", "topic", {0: 0})


def rows(database: Database) -> dict[str, list[tuple[object, ...]]]:
    """Return what is stored in each table of orders."""
    with psycopg.connect(database.superuser_url) as superuser:
        return {
            "orders": superuser.execute("SELECT order_uid, version, source_offset FROM orders ORDER BY 1").fetchall(),
            "parts": superuser.execute(
                "SELECT order_uid FROM delivery UNION ALL SELECT order_uid FROM payment UNION ALL"
                " SELECT order_uid FROM items UNION ALL SELECT order_uid FROM order_originals ORDER BY 1"
            ).fetchall(),
            "erased": superuser.execute("SELECT order_uid, record_offset FROM erased").fetchall(),
            "rejects": superuser.execute("SELECT record_offset, code, redrive_outcome FROM rejects").fetchall(),
        }


def test_a_tombstone_erases_everything_of_its_order_and_nothing_else(database: Database, store: ConsumerStore) -> None:
    handle(store, 0, UNKNOWN, OTHER)
    assert handle(store, 2, TOMBSTONE) == Counter({Outcome.ERASED: 1})
    stored = rows(database)
    assert stored["orders"] == [("other", 1, 1)]
    assert {uid for (uid,) in stored["parts"]} == {"other"}
    assert (stored["erased"], stored["rejects"]) == ([(UID, 2)], [])


def test_a_replay_does_not_bring_an_erased_order_back_and_a_newer_record_does(
    database: Database, store: ConsumerStore
) -> None:
    handle(store, 0, FIRST, SECOND, TOMBSTONE)
    rewind(database)
    assert handle(store, 0, FIRST, SECOND) == Counter({Outcome.SUPERSEDED: 2})
    assert handle(store, 2, TOMBSTONE) == Counter({Outcome.DUPLICATE: 1})
    assert rows(database)["erased"] == [(UID, 2)]
    assert handle(store, 3, FIRST) == Counter({Outcome.STORED: 1})
    # A replay of all, with other batches, ends in the same state.
    for _ in range(2):
        assert (rows(database)["orders"], rows(database)["erased"]) == ([(UID, 1, 3)], [])
        rewind(database)
        handle(store, 0, FIRST)
        handle(store, 1, SECOND, TOMBSTONE, FIRST)


def test_the_records_of_one_batch_are_handled_in_their_order(database: Database, store: ConsumerStore) -> None:
    handle(store, 0, FIRST)
    [before] = stored_times(database)
    outcomes = handle(store, 1, SECOND, TOMBSTONE, THIRD)
    assert outcomes == Counter({Outcome.SUPERSEDED: 1, Outcome.ERASED: 1, Outcome.STORED: 1})
    assert (rows(database)["orders"], rows(database)["erased"]) == ([(UID, 1, 3)], [])
    assert stored_times(database) > [before], "the order begins again"
    assert handle(store, 4, TOMBSTONE, TOMBSTONE) == Counter({Outcome.ERASED: 1, Outcome.DUPLICATE: 1})
    assert (rows(database)["orders"], rows(database)["erased"]) == ([], [(UID, 5)])


def stored_times(database: Database) -> list[dt.datetime]:
    with orderlib.connect(database.reader_url) as repository:
        return [stored.first_stored_at for stored in repository.stream()]


def test_save_stores_an_erased_order(database: Database, store: ConsumerStore) -> None:
    handle(store, 0, FIRST, TOMBSTONE)
    with orderlib.connect(database.writer_url) as repository:
        assert repository.save(ORDER) is Outcome.STORED
    assert (rows(database)["orders"], rows(database)["erased"]) == ([(UID, 1, None)], [])


def test_nothing_of_a_forgotten_order_remains_in_the_list_of_erased_orders(
    database: Database, store: ConsumerStore
) -> None:
    handle(store, 0, FIRST, TOMBSTONE, OTHER, (b"other", None))
    with open_connection(database.migrator_url, application_name="tests") as migrator:
        forget(migrator, UID)
        assert handle(store, 4, FIRST, TOMBSTONE) == Counter({Outcome.FORGOTTEN: 2})
        assert rows(database)["erased"] == [("other", 3)]
        with psycopg.connect(database.superuser_url) as superuser:
            digests = [digest for (digest,) in superuser.execute("SELECT sha256('other')").fetchall()]
        forget_again(migrator, digests)
    assert rows(database) == {"orders": [], "parts": [], "erased": [], "rejects": []}


def test_a_redrive_erases_only_an_older_order(database: Database, store: ConsumerStore) -> None:
    """The tombstones were rejects until now."""
    other = b"other", None
    handle(store, 0, FIRST, TOMBSTONE, other, OTHER, tombstones=Tombstones.REJECT)
    with open_connection(database.writer_url, application_name="tests") as writer:
        assert sum(redrive(writer, 10_000), Counter()) == Counter({Outcome.REJECTED: 2})
        expected = Counter({Outcome.ERASED: 1, Outcome.SUPERSEDED: 1})
        assert sum(redrive(writer, 10_000, tombstones=Tombstones.ERASE), Counter()) == expected
    stored = rows(database)
    assert (stored["orders"], stored["erased"]) == ([("other", 1, 3)], [(UID, 1)])
    assert [outcome for *_, outcome in stored["rejects"]] == ["erased", "superseded"]


def test_a_tombstone_that_postgresql_refuses_is_a_reject_and_its_neighbours_are_stored(
    database: Database, store: ConsumerStore
) -> None:
    handle(store, 0, FIRST)
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute("CREATE TABLE notes (order_uid text REFERENCES orders)")
        superuser.execute("INSERT INTO notes VALUES (%s)", [UID])
    assert handle(store, 1, TOMBSTONE, OTHER) == Counter({Outcome.REJECTED: 1, Outcome.STORED: 1})
    stored = rows(database)
    assert [uid for uid, *_ in stored["orders"]] == sorted([UID, "other"])
    assert (stored["erased"], stored["rejects"]) == ([], [(1, "refused_by_database", None)])
