"""Random honest histories through the real write path: ``reconcile`` finds nothing wrong with any of them."""

from __future__ import annotations

import datetime as dt
import functools
import time
from collections import defaultdict

import attrs
import psycopg
from hypothesis import given, settings
from hypothesis import strategies as st

import orderlib
from orderlib.ingestion.reconcile import Finding, Reconciliation, TopicState
from orderlib.ingestion.records import Batch, OffsetRange, Record, Tombstones, TopicPartition, classify_record
from orderlib.postgres.backfill import backfill
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.operations import forget, reset_offsets
from orderlib.postgres.rejects import redrive
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.snapshot import snapshot
from orderlib.repository import RecordPosition
from orderlib.testing import SAMPLE
from tests.support.databases import Database, delete_rows

SAMPLE_ORDER = orderlib.decode_order(SAMPLE)
GROUP, TOPIC, TOPIC_ID = "order-consumer", "orders", "BBBBBBBBBBBBBBBBBBBBBB"
TOPIC_IDS = {TOPIC: TOPIC_ID}
PARTITIONS = (0, 1)
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
SMALL_BYTES, USUAL_BYTES = 3_000, 8 * 2**20


@functools.cache
def value(kind: str, uid: str, content: int) -> bytes | None:
    signature = "x" * 4096 if kind.startswith("large") else ""
    text = orderlib.encode_order(attrs.evolve(SAMPLE_ORDER, order_uid=uid, sm_id=content, internal_signature=signature))
    match kind:
        case "null":
            return None
        case "unknown":
            return text[:-1] + b', "later": 1}'
        case "unknown, otherwise":
            return text[:-1] + b',"later":1}'
        case "bad" | "large and bad":
            return text.replace(b'"USD"', b'"usd"')
        case _:
            return text


@attrs.frozen
class History:
    """A topic in memory, and a database that its records are written to by the consumer's own code."""

    database: Database
    records: dict[int, list[Record]] = attrs.field(factory=lambda: defaultdict(list))

    def produce(self, partition: int, kind: str, uid: str, content: int, gap: int) -> None:
        log = self.records[partition]
        offset = (log[-1].position.offset if log else -1) + 1 + gap
        position = RecordPosition(topic_id=TOPIC_ID, partition=partition, offset=offset)
        record = Record(
            position=position,
            time=START + dt.timedelta(milliseconds=offset),
            topic=TOPIC,
            key=uid.encode() if content else None,
            value=value(kind, uid, content),
            headers=(("h", None), ("h", b"")) if content else (),
        )
        log.append(record)

    def end(self, partition: int) -> int:
        log = self.records[partition]
        return log[-1].position.offset + 1 if log else 0

    def handle(self, partition: int, count: int, max_bytes: int, tombstones: Tombstones) -> None:
        store = ConsumerStore(self.database.writer_url, GROUP, time.monotonic)
        try:
            store.claim_database()
            of_topic = [TopicPartition(TOPIC, number) for number in PARTITIONS]
            expected = store.start_partitions(TOPIC_IDS, dict.fromkeys(of_topic, 0))[of_topic[partition]]
            taken = [record for record in self.records[partition] if record.position.offset >= expected][:count]
            if not taken:
                return
            batch = Batch(
                topic_ids=TOPIC_IDS,
                ranges={
                    of_topic[partition]: OffsetRange(
                        expected_offset=expected, next_offset=taken[-1].position.offset + 1
                    )
                },
                classified=tuple(
                    (record, classify_record(record, max_bytes, pack_rows, tombstones)) for record in taken
                ),
            )
            store.write(batch, lambda _: None)
        finally:
            store.close()

    def redrive(self, tombstones: Tombstones) -> None:
        with open_connection(self.database.writer_url, application_name="tests") as connection:
            for _ in redrive(connection, USUAL_BYTES, tombstones=tombstones):
                pass

    def rewind(self, partition: int) -> None:
        with open_connection(self.database.migrator_url, application_name="tests") as connection:
            try:
                reset_offsets(connection, GROUP, TOPIC_ID, {partition: 0})
            except orderlib.ConfigurationError:
                return  # nothing was handled yet

    def save(self, uid: str, content: int) -> None:
        with orderlib.connect(self.database.writer_url, max_connections=1) as repository:
            repository.save(attrs.evolve(SAMPLE_ORDER, order_uid=uid, sm_id=content))

    def forget(self, uid: str) -> None:
        with open_connection(self.database.migrator_url, application_name="tests") as connection:
            forget(connection, uid)

    def backfill(self) -> None:
        with open_connection(self.database.writer_url, application_name="tests") as connection:
            for _ in backfill(connection):
                pass

    def an_hour_passes(self) -> None:
        """Operators do one thing after another. The clocks of the database are moved back instead of waiting."""
        with psycopg.connect(self.database.superuser_url, autocommit=True) as connection:
            # One by one, because Citus takes no stable function of a column.
            for uid, *times in connection.execute(
                "SELECT order_uid, first_stored_at, stored_at FROM orders"
            ).fetchall():
                earlier = [time - dt.timedelta(hours=1) for time in times]
                connection.execute(
                    "UPDATE orders SET first_stored_at = %s, stored_at = %s WHERE order_uid = %s", [*earlier, uid]
                )
            connection.execute(
                "UPDATE rejects SET rejected_at = rejected_at - interval '1 h',"
                " redriven_at = redriven_at - interval '1 h'"
            )

    def findings(self, max_bytes: int) -> list[Finding]:
        topic = TopicState(
            topic=TOPIC,
            topic_id=TOPIC_ID,
            earliest=dict.fromkeys(PARTITIONS, 0),
            ends={partition: self.end(partition) for partition in PARTITIONS},
            is_compacted=False,
        )
        with snapshot(self.database.reader_url, "tests") as stored:
            first = dict.fromkeys(PARTITIONS, 0)
            offsets, rejects, originals = stored.offsets(), stored.rejects(), stored.original_digests()
            proof = Reconciliation(topic, first, stored.group(), offsets, rejects, stored.forgotten(), originals)
            for partition, records in self.records.items():
                for record in records:
                    if record.position.offset < proof.next_offsets.get(partition, 0):
                        proof.on_record(record, classify_record(record, max_bytes))
            proof.on_stored(stored.erased(), stored.orders(), stored.orphans())
        return list(proof.findings())


KINDS = st.sampled_from(
    [
        "order",
        "order",
        "order",
        "large",
        "large",
        "unknown",
        "unknown, otherwise",
        "bad",
        "large and bad",
        "null",
        "null",
    ]
)
UIDS = st.sampled_from(["a", "b", "c"])
LIMITS = st.sampled_from([SMALL_BYTES, USUAL_BYTES])
TOMBSTONES = st.sampled_from(Tombstones)
ACTIONS = st.one_of(
    st.tuples(st.just("produce"), st.sampled_from(PARTITIONS), KINDS, UIDS, st.integers(0, 2), st.integers(0, 1)),
    st.tuples(st.just("handle"), st.sampled_from(PARTITIONS), st.integers(1, 4), LIMITS, TOMBSTONES),
    st.tuples(st.just("redrive"), TOMBSTONES),
    st.tuples(st.just("rewind"), st.sampled_from(PARTITIONS)),
    st.tuples(st.just("save"), UIDS, st.integers(0, 2)),
    st.tuples(st.just("forget"), UIDS),
    st.tuples(st.just("backfill")),
)


@settings(max_examples=15)
@given(actions=st.lists(ACTIONS, min_size=5, max_size=25), max_bytes=LIMITS, tombstones=TOMBSTONES)
def test_no_real_history_is_a_discrepancy(
    module_database: Database, actions: list[tuple[object, ...]], max_bytes: int, tombstones: Tombstones
) -> None:
    with psycopg.connect(module_database.superuser_url, autocommit=True) as connection:
        delete_rows(connection)
    history = History(module_database)
    for name, *arguments in actions:
        getattr(history, str(name))(*arguments)
        history.an_hour_passes()
    # Everything is handled in the end, and what a relaxed limit allows is redriven.
    for partition in PARTITIONS:
        history.handle(partition, 1000, max_bytes, tombstones)
        history.an_hour_passes()
    history.redrive(tombstones)
    assert history.findings(USUAL_BYTES) == []
    # The limit may be lowered after all of this.
    assert history.findings(SMALL_BYTES) == []
