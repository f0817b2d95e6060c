"""What ``reconcile`` proves: every corruption is a discrepancy, and no real history is one."""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import psycopg
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from psycopg import sql

import orderlib
from orderlib.ingestion.reconcile import MAX_FINDINGS, Reconciliation, SnapshotErased, TopicState
from orderlib.ingestion.records import StoredOffset
from orderlib.testing import SAMPLE
from sandbox import Sandbox
from services.admin.__main__ import main
from tests.support import ROOT
from tests.support.databases import Database, drop_database, make_database, without_foreign_keys
from tests.support.programs import run, succeed
from tests.support.waiting import wait_for

SAMPLE_ORDER = orderlib.decode_order(SAMPLE)

#: Columns that reconcile cannot prove, each with the reason. docs/what-reconcile-proves.md says the same.
CANNOT_BE_PROVED = {
    ("consumer_offsets", "updated_at"): "the clock of a batch: Kafka does not know it",
    ("orders", "first_stored_at"): "the clock of a batch: only its order with stored_at is known",
    ("orders", "version"): "counts the changes of an order, of which the topic may hold only the last ones",
    ("orders", "stored_at"): "the clock of a batch: only its order with first_stored_at is known",
    ("rejects", "rejected_at"): "the clock of a batch: only its order with redriven_at is known",
    ("rejects", "redriven_at"): "the clock of a redrive: only its order with rejected_at is known",
    ("schema_migrations", "number"): "how the schema was made, not what was sent",
    ("schema_migrations", "name"): "how the schema was made, not what was sent",
    ("schema_migrations", "applied_at"): "how the schema was made, not what was sent",
    ("forgotten", "forgotten_at"): "the clock of a forget: no record says when or why",
    ("erased", "erased_at"): "the clock of a batch: Kafka does not know it",
    ("consumer_groups", "only_row"): "always true: it makes the row the only one",
}


def order(uid: str, content: int = 0, **fields: Any) -> bytes:
    return orderlib.encode_order(attrs.evolve(SAMPLE_ORDER, order_uid=uid, sm_id=content, **fields))


def large(uid: str, content: int) -> bytes:
    """An order that is too large for the small limit, and not for the usual one."""
    return order(uid, content, internal_signature="x" * 4096)


@attrs.frozen
class DatabaseAndTopic:
    """A database and a topic, and the environment of programs that use them."""

    environ: Mapping[str, str]
    database: Database

    @property
    def topic(self) -> str:
        return self.environ["ORDERS_TOPIC"]

    def produce(self, *values: bytes | None, partition: int = 0, **config: object) -> None:
        """Send each value with its order_uid as the key, if it has one, and a header."""
        producer = Producer({"bootstrap.servers": self.environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], **config})
        for value in values:
            producer.produce(self.topic, value, b"key", partition, headers=[("h", b"1"), ("h", None)])
        assert producer.flush(30) == 0

    def produce_in_transactions(self, committed: bytes, aborted: bytes, partition: int = 0) -> None:
        settings = {"bootstrap.servers": self.environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], "transactional.id": self.topic}
        producer = Producer(settings)
        producer.init_transactions(30)
        for value, end in ((aborted, producer.abort_transaction), (committed, producer.commit_transaction)):
            producer.begin_transaction()
            producer.produce(self.topic, value, partition=partition)
            producer.flush(30)
            end(30)

    def consume(self, max_record_bytes: int = 8 * 2**20, tombstones: str = "reject") -> None:
        settings = {"ORDERS_MAX_RECORD_BYTES": str(max_record_bytes), "ORDERS_TOMBSTONES": tombstones}
        succeed("consumer --exit-at-end", {**self.environ, **settings})

    def admin(self, command: str) -> tuple[int, str]:
        """Run a command in this process: its status and stdout."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            status = main(command.split(), self.environ)
        return status, out.getvalue()

    def reconcile(self) -> dict[str, Any]:
        status, text = self.admin("reconcile --json")
        result: dict[str, Any] = json.loads(text)
        assert status == (1 if result["findings"] else 0)
        assert result["findings_total"] == len(result["findings"])
        return result

    def assert_holds(self) -> dict[str, Any]:
        result = self.reconcile()
        assert result["findings"] == []
        return result

    def not_proved(self) -> dict[str, int]:
        return {kind["what"]: kind["count"] for kind in self.reconcile()["not_proved"]}

    @contextlib.contextmanager
    def superuser(self) -> Iterator[psycopg.Connection]:
        """A session that does not check foreign keys."""
        with without_foreign_keys(self.database) as connection:
            connection.execute("SET TIME ZONE 'UTC'")
            yield connection


@pytest.fixture
def place(environ: dict[str, str], database: Database) -> DatabaseAndTopic:
    return DatabaseAndTopic(environ, database)


def fill(place: DatabaseAndTopic) -> None:
    """Write a history of every kind of record through the real consumer, redrive and repository."""
    place.produce(
        order("updated", 1),
        order("repeated", 1),
        large("never-before", 1),
        large("later", 1),
        large("same", 2),
        b"no JSON",
        b"",
        None,
        order("invalid").replace(b'"USD"', b'"usd"').replace(b'"sale":30', b'"sale":300'),
        large("stays-rejected", 1).replace(b'"USD"', b'"usd"'),
        # With an unknown field, so that it has an original.
        order("updated", 2)[:-1] + b', "later": 1}',
        order("repeated", 1),
        order("later", 2),
        b"\xff",
        large("twice", 1),
        large("twice", 1),
    )
    place.produce(order("moved", 1), order("other", 1), partition=1)
    place.produce(order("moved", 2), partition=0)
    place.produce_in_transactions(order("committed", 1), order("aborted", 1))
    with place.superuser() as connection:
        connection.execute("ALTER TABLE orders ADD CONSTRAINT no_zz CHECK (locale <> 'zz') NOT VALID")
    place.produce(order("refused", 1, locale="zz"), order("person", 1), partition=1)
    place.consume(max_record_bytes=4000)
    assert place.admin("rejects redrive --code too_large")[0] == 0
    with orderlib.connect(place.database.writer_url) as repository:
        repository.save(attrs.evolve(SAMPLE_ORDER, order_uid="from-python"))
    assert place.admin("forget person --yes")[0] == 0
    # Every key is "key".
    place.produce(order("key", 1), None, partition=1)
    place.consume(tombstones="erase")


def outcomes(place: DatabaseAndTopic) -> dict[int, str | None]:
    with place.superuser() as connection:
        return dict(
            connection.execute("SELECT record_offset, redrive_outcome FROM rejects WHERE partition = 0").fetchall()
        )


@pytest.fixture(scope="module")
def history(sandbox: Sandbox, _template: str) -> Iterator[DatabaseAndTopic]:
    """A filled place. Every test restores its tables."""
    database = make_database(sandbox, _template)
    topic = f"reconciled-{time.time_ns()}"
    admin = AdminClient({"bootstrap.servers": sandbox.kafka.bootstrap_servers})
    place = DatabaseAndTopic(
        {
            **database.environ(),
            "PATH": "/usr/bin:/bin",
            "ORDERS_KAFKA_BOOTSTRAP_SERVERS": sandbox.kafka.bootstrap_servers,
            "ORDERS_TOPIC": topic,
            "ORDERS_METRICS_BIND": "127.0.0.1:0",
            "PYTHONPATH": str(ROOT),
        },
        database,
    )
    succeed("admin topics --partitions 2", place.environ)
    fill(place)
    with place.superuser() as connection:
        for (name,) in connection.execute(
            "SELECT conrelid::regclass || ' DROP CONSTRAINT ' || conname FROM pg_constraint"
            " WHERE contype = 'c' AND connamespace = 'public'::regnamespace"
        ).fetchall():
            connection.execute(f"ALTER TABLE {name}".encode())
        connection.execute("CREATE SCHEMA backup")
        for table in tables(connection):
            connection.execute(f"CREATE TABLE backup.{table} AS TABLE {table}".encode())
    yield place
    admin.delete_topics([topic])[topic].exception(30)
    drop_database(sandbox, database)


def tables(connection: psycopg.Connection) -> list[str]:
    rows = connection.execute("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public' ORDER BY 1").fetchall()
    return [name for (name,) in rows]


@contextlib.contextmanager
def corrupted(place: DatabaseAndTopic, *changed: str) -> Iterator[psycopg.Connection]:
    """A superuser's session. At its end the changed tables are restored, by default all."""
    with place.superuser() as connection:
        try:
            yield connection
        finally:
            restore = "; ".join(
                f"DELETE FROM {t}; INSERT INTO {t} SELECT * FROM backup.{t}" for t in changed or tables(connection)
            )
            connection.execute(restore.encode())


def test_a_real_history_has_no_discrepancy_and_what_cannot_be_proved_is_named(history: DatabaseAndTopic) -> None:
    result = history.assert_holds()
    # 2: never before; 3: a later record won; 4: nothing before; 9: refused; 14 and 15: one after the other.
    assert {k: v for k, v in outcomes(history).items() if v} == {
        2: "stored",
        3: "superseded",
        4: "stored",
        9: "rejected",
        14: "stored",
        15: "duplicate",
    }
    named = {kind["what"]: kind for kind in result["not_proved"]}
    assert [example["order_uid"] for example in named["saved from Python"]["examples"]] == ["from-python"]
    assert sum(kind["count"] for kind in named.values()) == 3
    assert [result["counts"][what] for what in ("forgotten", "tombstones", "erased")] == [1, 1, 1]
    text = history.admin("reconcile")[1]
    assert "from-python" in text
    assert "refused" in text


#: Values to put in place of the stored one, by type: SQL with the column as {c}.
CHANGES: dict[str, tuple[str, ...]] = {
    "text": ("{c} || 'x'", "''"),
    "bigint": ("{c} + 1", "{c} + 1000000", "-1"),
    "integer": ("{c} + 100", "-1"),
    "bytea": ("{c} || '\\x00'", "sha256({c})", "NULL", "''"),
    "timestamp with time zone": ("{c} + interval '1 s'", "'infinity'", "'0001-01-01 BC'"),
    "json": ("'[]'", "NULL", "'{{}}'", "'5'"),
    "jsonb": ("'{{}}'", "'5'", "jsonb_set({c}, '{{total}}', '77')", "jsonb_set({c}, '{{first,0,path}}', '\"$.x\"')"),
    "boolean": ("NOT {c}",),
}


def places_of(table: str) -> list[tuple[str, dict[str, object]]]:
    """Return a row of each kind, and the place that a discrepancy must name."""
    if table == "rejects":
        return [(f"partition = 0 AND record_offset = {n}", {"partition": 0, "offset": n}) for n in (5, 6, 7, 8, 2, 15)]
    if table == "consumer_groups":
        return [("true", {"partition": 0})]
    if table == "erased":
        return [("true", {"order_uid": "key", "partition": 1})]
    if table == "forgotten":
        return [("true", {"order_uid": "person", "partition": 1})]
    if table == "consumer_offsets":
        return [("partition = 0", {"partition": 0})]
    return [("order_uid = 'updated'", {"order_uid": "updated"})]


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.faults) for n in range(1, max(map(len, CHANGES.values()))))]
)
def test_a_change_of_any_column_of_any_table_is_a_discrepancy_that_names_the_place(
    history: DatabaseAndTopic, number: int
) -> None:
    """Read from information_schema, so that a new column must be proved, or listed with the reason why it cannot be."""
    missed = []
    with history.superuser() as connection:
        found = connection.execute(
            """
            SELECT table_name::text, column_name::text, data_type::text
            FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
            WHERE table_schema = 'public' AND table_type = 'BASE TABLE' ORDER BY table_name, ordinal_position
            """
        ).fetchall()
    assert CANNOT_BE_PROVED.keys() <= {(table, column) for table, column, _ in found}
    for table, column, data_type in found:
        if (table, column) in CANNOT_BE_PROVED or number >= len(CHANGES[data_type]):
            continue
        change = f"({CHANGES[data_type][number]})::{data_type}"
        with corrupted(history, table) as connection:
            changed = [place for where, place in places_of(table) if _change(connection, table, column, change, where)]
            findings = history.reconcile()["findings"] if changed else []
        # A row with another key is named by the key that it has now.
        moved = {"partition": "partition", "record_offset": "offset", "order_uid": "order_uid"}.get(column)
        expected = [{name: value for name, value in place.items() if name != moved} for place in changed]
        missed += [
            (table, column, change, place, findings)
            for place in expected
            if not any(place.items() <= finding.items() for finding in findings)
        ]
    assert missed == []


def _change(connection: psycopg.Connection, table: str, column: str, change: str, where: str) -> bool:
    """Change one column. Return whether that is possible and changes a row."""
    name = sql.Identifier(column)
    value = sql.SQL(change.replace("{c}", "{0}")).format(name)
    try:
        done = connection.execute(
            sql.SQL("UPDATE {} SET {} = {} WHERE {} AND {} IS DISTINCT FROM {}").format(
                sql.Identifier(table),
                name,
                value,
                sql.SQL(where),
                sql.SQL("{}::text").format(name),
                sql.SQL("({})::text").format(value),
            )
        )
    except (psycopg.errors.NotNullViolation, psycopg.errors.UniqueViolation):
        return False
    return done.rowcount > 0


#: Corruptions of complete rows, and combined ones that keep the database consistent.
PLANTED = {
    "a valid order is deleted and a reject is planted at its position": (
        """
        INSERT INTO rejects (topic_id, partition, record_offset, topic, record_time, key, value, headers, code, faults)
        SELECT topic_id, source_partition, source_offset, topic, source_time, 'key', 'x', '[]', 'invalid_order',
            '{"total": 1, "first": [{"path": "$", "expected": "", "found": ""}]}'
        FROM orders JOIN consumer_offsets c ON partition = source_partition WHERE order_uid = 'updated';
        DELETE FROM items WHERE order_uid = 'updated'; DELETE FROM delivery WHERE order_uid = 'updated';
        DELETE FROM payment WHERE order_uid = 'updated'; DELETE FROM orders WHERE order_uid = 'updated'
        """,
        {"partition": 0, "offset": 10},
    ),
    "content and digest are those of another order": (
        """
        UPDATE orders o SET sm_id = n.sm_id, content_sha256 = n.content_sha256 FROM orders n
        WHERE o.order_uid = 'updated' AND n.order_uid = 'other'
        """,
        {"order_uid": "updated"},
    ),
    "an order has the position of another one": (
        """
        UPDATE orders o SET source_partition = n.source_partition, source_offset = n.source_offset,
            source_time = n.source_time
        FROM orders n WHERE o.order_uid = 'updated' AND n.order_uid = 'repeated'
        """,
        {"order_uid": "updated"},
    ),
    "an order that was never sent has the position of another one": (
        """
        UPDATE orders o SET source_topic_id = n.source_topic_id, source_partition = n.source_partition,
            source_offset = n.source_offset, source_time = n.source_time
        FROM orders n WHERE o.order_uid = 'from-python' AND n.order_uid = 'repeated'
        """,
        {"order_uid": "from-python"},
    ),
    "an order has an older position": (
        "UPDATE orders SET source_offset = 0 WHERE order_uid = 'updated'",
        {"order_uid": "updated"},
    ),
    "an order has a negative position": (
        "UPDATE orders SET source_offset = -5 WHERE order_uid = 'updated'",
        {"order_uid": "updated"},
    ),
    "an order is from an unknown topic id": (
        "UPDATE orders SET source_topic_id = 'AAAAAAAAAAAAAAAAAAAAAA' WHERE order_uid = 'updated'",
        {"order_uid": "updated"},
    ),
    "an order has half a position": (
        "UPDATE orders SET source_topic_id = NULL, source_partition = NULL WHERE order_uid = 'updated'",
        {"order_uid": "updated"},
    ),
    "an order is copied, with the position of the first": (
        """
        INSERT INTO orders SELECT (jsonb_populate_record(o, '{"order_uid": "extra"}')).* FROM orders o
        WHERE order_uid = 'updated';
        INSERT INTO delivery SELECT (jsonb_populate_record(o, '{"order_uid": "extra"}')).* FROM delivery o
        WHERE order_uid = 'updated';
        INSERT INTO payment SELECT (jsonb_populate_record(o, '{"order_uid": "extra"}')).* FROM payment o
        WHERE order_uid = 'updated';
        INSERT INTO items SELECT (jsonb_populate_record(o, '{"order_uid": "extra"}')).* FROM items o
        WHERE order_uid = 'updated'
        """,
        {"order_uid": "extra"},
    ),
    "an order is from beyond next_offset": (
        "UPDATE orders SET source_offset = 5000 WHERE order_uid = 'updated'",
        {"order_uid": "updated", "offset": 5000},
    ),
    "an order is missing": (
        """
        DELETE FROM items WHERE order_uid = 'other'; DELETE FROM delivery WHERE order_uid = 'other';
        DELETE FROM payment WHERE order_uid = 'other'; DELETE FROM orders WHERE order_uid = 'other'
        """,
        {"order_uid": "other", "partition": 1},
    ),
    "a delivery is missing": ("DELETE FROM delivery WHERE order_uid = 'other'", {"order_uid": "other"}),
    "a payment is missing": ("DELETE FROM payment WHERE order_uid = 'other'", {"order_uid": "other"}),
    "all items are missing": ("DELETE FROM items WHERE order_uid = 'other'", {"order_uid": "other"}),
    "an item is twice there": (
        """
        INSERT INTO items SELECT (jsonb_populate_record(i, '{"line": 9}')).* FROM items i
        WHERE order_uid = 'other' AND line = 0
        """,
        {"order_uid": "other"},
    ),
    "lines have a gap": (
        "UPDATE items SET line = line + 100 WHERE order_uid = 'other' AND line > 0",
        {"order_uid": "other"},
    ),
    "parts without an order": ("DELETE FROM orders WHERE order_uid = 'from-python'", {"order_uid": "from-python"}),
    "a reject is missing": ("DELETE FROM rejects WHERE record_offset = 5", {"partition": 0, "offset": 5}),
    "a reject has another position": (
        "UPDATE rejects SET record_offset = 1 WHERE record_offset = 5",
        {"partition": 0, "offset": 5},
    ),
    "a reject is planted where Kafka has no record": (
        # The marker of the transaction that was aborted, or of the one that was committed.
        """
        INSERT INTO rejects SELECT (jsonb_populate_record(NULL::rejects, to_jsonb(r) || '{"record_offset": 18}')).*
        FROM rejects r WHERE record_offset = 5
        """,
        {"partition": 0, "offset": 18},
    ),
    "a reject is planted beyond next_offset": (
        """
        INSERT INTO rejects SELECT (jsonb_populate_record(NULL::rejects, to_jsonb(r) || '{"record_offset": 4000}')).*
        FROM rejects r WHERE record_offset = 5
        """,
        {"partition": 0, "offset": 4000},
    ),
    "a reject is planted in a partition without an offset": (
        """
        INSERT INTO rejects SELECT (jsonb_populate_record(NULL::rejects, to_jsonb(r) || '{"partition": 70}')).*
        FROM rejects r WHERE record_offset = 5
        """,
        {"partition": 70, "offset": 5},
    ),
    "two rejects have changed contents": (
        """
        UPDATE rejects r SET key = o.key, value = o.value FROM rejects o
        WHERE r.record_offset = 5 AND o.record_offset = 8 AND r.partition = 0 AND o.partition = 0
        """,
        {"partition": 0, "offset": 5},
    ),
    "another code": ("UPDATE rejects SET code = 'too_large' WHERE record_offset = 5", {"partition": 0, "offset": 5}),
    "next_offset is moved forward": (
        "UPDATE consumer_offsets SET next_offset = next_offset + 1 WHERE partition = 1",
        {"partition": 1},
    ),
    "next_offset is moved back": ("UPDATE consumer_offsets SET next_offset = 4 WHERE partition = 0", {"partition": 0}),
    "a forgotten order is not on the list": ("DELETE FROM forgotten", {"order_uid": "person", "partition": 1}),
    "a stored order is called forgotten": (
        "INSERT INTO forgotten VALUES (sha256('updated'), now())",
        {"order_uid": "updated"},
    ),
    "a reject has the key of a forgotten order": (
        "INSERT INTO forgotten VALUES (sha256('key'), now())",
        {"partition": 0, "offset": 5},
    ),
    "stored is called forgotten": (
        "UPDATE rejects SET redrive_outcome = 'forgotten' WHERE record_offset = 2",
        {"partition": 0, "offset": 2},
    ),
    "an erased order is not on the list": ("DELETE FROM erased", {"order_uid": "key", "partition": 1}),
    "a stored order is called erased": (
        """
        INSERT INTO erased SELECT order_uid, source_topic_id, source_partition, source_offset, now() FROM orders
        WHERE order_uid = 'updated'
        """,
        {"order_uid": "updated", "partition": 0},
    ),
    "an order that was never sent is called erased": (
        "INSERT INTO erased SELECT 'never', topic_id, partition, record_offset, now() FROM erased",
        {"order_uid": "never", "partition": 1},
    ),
    "an erased order is stored again": (
        """
        UPDATE orders SET order_uid = 'key', source_partition = 1, source_offset = 4 WHERE order_uid = 'updated'
        """,
        {"order_uid": "key", "partition": 1, "offset": 4},
    ),
    "stored is called erased": (
        "UPDATE rejects SET redrive_outcome = 'erased' WHERE record_offset = 2",
        {"partition": 0, "offset": 2},
    ),
    "a refused record is called erased": (
        "UPDATE rejects SET redrive_outcome = 'erased', redriven_at = now() WHERE record_offset = 5",
        {"partition": 0, "offset": 5},
    ),
    "an offset is missing": ("DELETE FROM consumer_offsets WHERE partition = 1", {"partition": 1}),
    "every offset is missing": ("DELETE FROM consumer_offsets", {"partition": 1}),
    "stored is called superseded": (
        "UPDATE rejects SET redrive_outcome = 'superseded' WHERE record_offset = 2",
        {"partition": 0, "offset": 2},
    ),
    "stored is called duplicate": (
        "UPDATE rejects SET redrive_outcome = 'duplicate' WHERE record_offset = 2",
        {"partition": 0, "offset": 2},
    ),
    "stored is called rejected": (
        "UPDATE rejects SET redrive_outcome = 'rejected' WHERE record_offset = 2",
        {"partition": 0, "offset": 2},
    ),
    "stored is called not redriven": (
        "UPDATE rejects SET redrive_outcome = NULL, redriven_at = NULL WHERE record_offset = 2",
        {"partition": 0, "offset": 2},
    ),
    "duplicate is called stored": (
        "UPDATE rejects SET redrive_outcome = 'stored' WHERE record_offset = 15",
        {"partition": 0, "offset": 15},
    ),
    "duplicate is called superseded": (
        "UPDATE rejects SET redrive_outcome = 'superseded' WHERE record_offset = 15",
        {"partition": 0, "offset": 15},
    ),
    "superseded is called duplicate": (
        "UPDATE rejects SET redrive_outcome = 'duplicate' WHERE record_offset = 3",
        {"partition": 0, "offset": 3},
    ),
    "superseded is called rejected": (
        "UPDATE rejects SET redrive_outcome = 'rejected' WHERE record_offset = 3",
        {"partition": 0, "offset": 3},
    ),
    "rejected is called stored": (
        "UPDATE rejects SET redrive_outcome = 'stored' WHERE record_offset = 9",
        {"partition": 0, "offset": 9},
    ),
    "a refused record is called superseded": (
        "UPDATE rejects SET redrive_outcome = 'superseded', redriven_at = now() WHERE record_offset = 5",
        {"partition": 0, "offset": 5},
    ),
}


@pytest.mark.parametrize(("statements", "named"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_corruption_is_a_discrepancy_that_names_the_place(
    history: DatabaseAndTopic, statements: str, named: dict[str, object]
) -> None:
    with corrupted(history) as connection:
        for statement in statements.split(";"):
            assert connection.execute(statement.encode()).rowcount > 0
        findings = history.reconcile()["findings"]
    assert any(named.items() <= finding.items() for finding in findings), findings


def test_an_order_that_was_replaced_from_python_is_named(history: DatabaseAndTopic) -> None:
    """A save after the record is allowed. It looks like a change of content, digest and position together."""
    with corrupted(history):
        with orderlib.connect(history.database.writer_url) as repository:
            repository.save(attrs.evolve(SAMPLE_ORDER, order_uid="updated", sm_id=77))
        result = history.assert_holds()
        [named] = [kind for kind in result["not_proved"] if "after Kafka's record" in kind["what"]]
        assert [example["order_uid"] for example in named["examples"]] == ["updated"]
        assert "updated: " in history.admin("reconcile")[1]


def test_the_reader_cannot_read_the_content_of_a_reject(history: DatabaseAndTopic) -> None:
    with psycopg.connect(history.database.reader_url, autocommit=True) as connection:
        columns = connection.execute("SELECT * FROM reject_digests LIMIT 1").description or []
        assert not {"key", "value", "headers", "faults"} & {column.name for column in columns}
        for column in ("key", "value", "headers"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(f"SELECT {column} FROM rejects".encode())


def test_a_rewind_is_a_discrepancy_until_all_records_are_handled_again(place: DatabaseAndTopic) -> None:
    place.produce(order("a", 1), large("b", 1), b"no JSON", order("a", 2))
    place.produce(order("a", 3), partition=1)
    place.consume(max_record_bytes=4000)
    assert place.admin("offsets reset --to-earliest --execute --yes")[0] == 0
    assert {(f["order_uid"], f["partition"]) for f in place.reconcile()["findings"]} >= {(None, 0)}
    # Under another limit: the record of a reject becomes an order at its own position.
    place.consume()
    assert outcomes(place)[1] == "superseded"
    place.assert_holds()
    assert place.admin(f"rejects redrive {place.topic}/0/1")[0] == 0
    place.assert_holds()


def test_a_topic_of_which_no_record_was_handled_is_a_configuration_error(place: DatabaseAndTopic) -> None:
    done = run("admin reconcile", place.environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"nothing to compare: no record of topic {place.topic!r} was handled yet" in done.stderr


def test_a_compacted_topic_has_no_discrepancy(place: DatabaseAndTopic, make_topic: Callable[..., str]) -> None:
    topic = make_topic(1, cleanup_policy="compact", segment_ms="100", min_cleanable_dirty_ratio="0.0001")
    place = DatabaseAndTopic({**place.environ, "ORDERS_TOPIC": topic}, place.database)
    place.produce(order("first", 1), order("second", 1), b"no JSON")
    place.consume()
    place.produce(order("third", 1))
    place.consume()

    def is_compacted() -> bool:
        # All keys are equal, so Kafka keeps the last record only, once a newer segment began.
        place.produce(order("third", 1))
        place.consume()
        compacted = place.not_proved().get("rejects whose record Kafka no longer has: the topic is compacted")
        return compacted == 1

    wait_for(is_compacted, 60)
    place.assert_holds()


def test_ranges_that_kafka_no_longer_holds_are_named(place: DatabaseAndTopic) -> None:
    place.produce(order("gone", 1), b"no JSON", order("there", 1))
    place.consume()
    admin = AdminClient({"bootstrap.servers": place.environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})
    for future in admin.delete_records([TopicPartition(place.topic, 0, 2)]).values():
        future.result(30)
    result = place.assert_holds()
    assert result["not_read"] == [{"partition": 0, "first": 0, "next": 2}]
    assert {kind["what"]: kind["count"] for kind in result["not_proved"]} == {
        "stored from records that were not read": 1,
        "rejects of records that were not read": 1,
    }
    place.produce(*(order("there", n) for n in range(2)))
    for future in admin.delete_records([TopicPartition(place.topic, 0, 4)]).values():
        future.result(30)
    assert any("never handled" in finding["what"] for finding in place.reconcile()["findings"])


def test_records_of_a_forgotten_order_are_counted(place: DatabaseAndTopic) -> None:
    place.produce(order("person", 1), order("other", 1))
    place.consume()
    for uid in ("person", "not-sent"):
        assert place.admin(f"forget {uid} --yes")[0] == 0
    assert place.assert_holds()["counts"]["forgotten"] == 1
    assert place.not_proved() == {"forgotten orders of which no record was read": 1}


def test_the_page_lists_every_column_that_cannot_be_proved() -> None:
    page = Path(ROOT / "docs" / "what-reconcile-proves.md").read_text(encoding="utf-8")
    for table, column in CANNOT_BE_PROVED:
        assert f"`{table}.{column}`" in page


def test_orders_in_several_partitions_are_counted_and_the_first_are_named(place: DatabaseAndTopic) -> None:
    for partition in (0, 1):
        place.produce(*(order(f"order-{number}") for number in range(103)), partition=partition)
    place.consume()
    result = place.assert_holds()
    assert (len(result["several_partitions"]), result["several_partitions_total"]) == (100, 103)
    assert "… and 3 more with records in several partitions" in place.admin("reconcile")[1]


def test_discrepancies_beyond_the_limit_are_counted_and_not_stored() -> None:
    topic = TopicState(topic="orders", topic_id="id", earliest={}, ends={}, is_compacted=False)
    proof = Reconciliation(topic, {}, None, [], [])
    for number in range(MAX_FINDINGS + 7):
        proof.on_orphan("items", f"order-{number}")
    assert (len(list(proof.findings())), proof.unlisted) == (MAX_FINDINGS, 7)


@pytest.mark.parametrize("offset", [-1, 3, 4])
def test_an_erased_order_beyond_next_offset_is_a_discrepancy_even_if_the_topic_is_compacted(offset: int) -> None:
    """Kafka may have deleted any record of such a topic, so no missing record can show it."""
    topic = TopicState(topic="orders", topic_id="id", earliest={0: 0}, ends={0: 9}, is_compacted=True)
    stored = StoredOffset(
        group="group", topic="orders", topic_id="id", partition=0, next_offset=3, updated_at=dt.datetime.now(dt.UTC)
    )
    proof = Reconciliation(topic, {0: 0}, "group", [stored], [])
    proof.on_erased(SnapshotErased(order_uid="one", topic_id="id", partition=0, offset=offset))
    [finding] = proof.findings()
    assert (finding.order_uid, finding.offset) == ("one", offset)


def test_a_partition_of_which_nothing_is_stored_is_a_discrepancy_if_it_has_records() -> None:
    topic = TopicState(topic="orders", topic_id="id", earliest={0: 0, 1: 5}, ends={0: 9, 1: 5}, is_compacted=False)
    [finding] = Reconciliation(topic, {}, "group", [], []).findings()
    assert (finding.partition, finding.offset) == (0, None)
