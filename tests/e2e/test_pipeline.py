"""The complete path of an order: sender, Kafka, consumer, PostgreSQL, API."""

from __future__ import annotations

import base64
import json
import signal
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import attrs
import psycopg
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

import orderlib
from orderlib.errors import RejectedError
from orderlib.testing import SAMPLE
from tests.support.databases import Database
from tests.support.programs import events, run, running, succeed
from tests.support.waiting import wait_for


def acknowledged(manifest: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def values_in_kafka(environ: Mapping[str, str], places: list[tuple[int, int]]) -> dict[tuple[int, int], bytes | None]:
    """Return the values at these positions, read without orderlib."""
    wanted = set(places)
    consumer = Consumer(
        {
            "bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"],
            "group.id": "test",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
        }
    )
    consumer.assign([TopicPartition(environ["ORDERS_TOPIC"], partition, 0) for partition in {p for p, _ in places}])
    found = {}
    deadline_s = time.monotonic() + 30
    while wanted:
        assert time.monotonic() < deadline_s
        for message in consumer.consume(1000, 0.1):
            place = (message.partition(), message.offset())
            if message.error() is None and place in wanted:
                wanted.discard(place)
                found[place] = message.value()
    consumer.close()
    return found


def assert_all_accounted_for(environ: Mapping[str, str], database: Database, manifest: Path) -> tuple[int, int]:
    """Check that every acknowledged record is a stored order or an unchanged reject. Return how many of each.

    It does not use ``reconcile``, so the two can be compared.
    """
    lines = acknowledged(manifest)
    values = values_in_kafka(environ, [(int(str(line["partition"])), int(str(line["offset"]))) for line in lines])
    last: dict[str, orderlib.Order] = {}
    bad: dict[tuple[int, int], bytes | None] = {}
    for place in sorted(values):
        try:
            order = orderlib.decode_order(values[place] or b"")
        except RejectedError:
            bad[place] = values[place]
        else:
            last[order.order_uid] = order
    with orderlib.connect(database.reader_url, timeout_s=60) as repository:
        assert repository.get_many(last) == last
    with psycopg.connect(database.superuser_url) as connection:
        rows = connection.execute("SELECT partition, record_offset, value FROM rejects").fetchall()
    assert {(partition, offset): value for partition, offset, value in rows} == bad
    return len(last), len(bad)


def test_the_sample_is_returned_over_http_with_equal_fields(environ: dict[str, str], tmp_path: Path) -> None:
    sample = orderlib.decode_order(SAMPLE)
    other = attrs.evolve(
        sample, order_uid="paid-elsewhere", payment=attrs.evolve(sample.payment, transaction="provider-17")
    )
    succeed("sender --file -", environ, stdin=SAMPLE.rstrip(b"\n") + b"\n" + orderlib.encode_order(other) + b"\n")
    succeed("consumer --exit-at-end", environ)
    log = tmp_path / "api.log"
    with running("api", environ, log):
        listening = wait_for(lambda: [e for e in events(log.read_text()) if e["event"] == "listening"])
        for order_uid, expected in ((sample.order_uid, json.loads(SAMPLE)), (other.order_uid, None)):
            url = f"http://{listening[0]['address']}/orders/{order_uid}"
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept": "application/json"})) as answer:
                got = json.load(answer)
            assert got == (expected or orderlib.order_to_plain(other))


def test_each_of_1_000_valid_and_invalid_records_is_stored_or_rejected(
    environ: dict[str, str], database: Database, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest"
    succeed(f"sender --count 1000 --seed 7 --bad-rate 0.05 --manifest {manifest}", environ)
    succeed("consumer --exit-at-end", environ)
    stored, rejected = assert_all_accounted_for(environ, database, manifest)
    assert stored + rejected == len(acknowledged(manifest)) == 1_000
    assert 25 < rejected < 100
    succeed(f"admin reconcile --manifest {manifest}", environ)


@pytest.mark.faults  # tests/faults/test_killed.py kills one in a transaction
def test_a_killed_consumer_continues_at_its_stored_offsets(
    environ: dict[str, str], database: Database, tmp_path: Path
) -> None:
    manifest = tmp_path / "manifest"
    succeed(f"sender --count 6000 --seed 8 --bad-rate 0.05 --manifest {manifest}", environ)

    def some_are_stored() -> bool:
        row = connection.execute("SELECT count(*) FROM orders").fetchone()
        return bool(row and row[0])

    with psycopg.connect(database.superuser_url, autocommit=True) as connection:
        with running("consumer", environ, tmp_path / "consumer.log") as consumer:
            wait_for(some_are_stored)
            consumer.send_signal(signal.SIGKILL)
        row = connection.execute("SELECT sum(next_offset) FROM consumer_offsets").fetchone()
        assert row is not None
        assert 0 < row[0] < 6_000, "it was killed too early or too late to show anything"
    succeed("consumer --exit-at-end", environ)
    assert sum(assert_all_accounted_for(environ, database, manifest)) == 6_000
    succeed("admin reconcile", environ)


def test_reconcile_finds_every_change_made_directly_in_the_database(
    environ: dict[str, str], database: Database
) -> None:
    succeed("sender --count 200 --seed 9 --bad-rate 0.1", environ)
    succeed("consumer --exit-at-end", environ)
    assert json.loads(succeed("admin reconcile --json", environ))["findings"] == []
    with psycopg.connect(database.superuser_url, autocommit=True) as connection:
        uids = [uid for (uid,) in connection.execute("SELECT order_uid FROM orders ORDER BY order_uid LIMIT 4")]
        missing, changed, surplus, lost_part = uids
        connection.execute("DELETE FROM orders WHERE order_uid = %s", [missing])
        connection.execute("UPDATE delivery SET city = city || '!' WHERE order_uid = %s", [changed])
        connection.execute(
            """
            INSERT INTO items SELECT order_uid, 999, chrt_id, track_number, price, rid, name, sale, size, total_price,
                nm_id, brand, status FROM items WHERE order_uid = %s AND line = 0
            """,
            [surplus],
        )
        connection.execute("DELETE FROM items WHERE order_uid = %s", [lost_part])
        reject = connection.execute("DELETE FROM rejects WHERE ctid = (SELECT min(ctid) FROM rejects) RETURNING *")
        assert reject.rowcount == 1
    done = run("admin reconcile --json", environ)
    assert done.returncode == 1
    found = json.loads(done.stdout)["findings"]
    assert {finding["order_uid"] for finding in found} == {missing, changed, surplus, lost_part, None}
    assert len(found) == 5


def test_reconcile_has_no_false_discrepancy_while_the_consumer_runs(environ: dict[str, str], tmp_path: Path) -> None:
    manifest = tmp_path / "manifest"
    with running("consumer", environ, tmp_path / "consumer.log"):
        for seed in range(3):
            succeed(f"sender --count 500 --seed {seed % 2} --bad-rate 0.05 --manifest {manifest}", environ)
            done = run("admin reconcile", environ)
            # Before the first batch there is nothing to compare yet.
            assert done.returncode == 0 or "nothing to compare" in done.stderr, done.stdout


def test_a_redriven_reject_is_stored_once_and_keeps_its_outcome(environ: dict[str, str]) -> None:
    succeed("sender --count 50 --seed 3", environ)
    large = attrs.evolve(orderlib.decode_order(SAMPLE), order_uid="large", internal_signature="x" * 4096)
    succeed("sender --file -", environ, stdin=orderlib.encode_order(large))
    small = {**environ, "ORDERS_MAX_RECORD_BYTES": "4500"}
    succeed("consumer --exit-at-end", small)
    [reject] = [r for r in json.loads(succeed("admin rejects list --json", environ)) if r["code"] == "too_large"]
    shown = json.loads(succeed(f"admin rejects show {reject['position']}", environ))
    assert shown["value"] == {"text": orderlib.encode_order(large).decode()}
    assert run("admin get large", environ).returncode == 1
    [first] = json.loads(succeed("admin rejects redrive --code too_large --json", environ))
    [again] = json.loads(succeed("admin rejects redrive --code too_large --json", environ))
    assert (first["stored"], sum(first.values()), sum(again.values())) == (1, 1, 0)
    assert orderlib.decode_order(succeed("admin get large", environ).encode()) == large
    [reject] = [r for r in json.loads(succeed("admin rejects list --json", environ)) if r["code"] == "too_large"]
    assert reject["redrive_outcome"] == "stored"
    succeed("admin reconcile", environ)


def test_offsets_move_only_with_execute_and_a_rewind_changes_no_data(
    environ: dict[str, str], database: Database
) -> None:
    succeed("sender --count 300 --seed 4 --bad-rate 0.1", environ)
    succeed("consumer --exit-at-end", environ)

    def everything() -> list[object]:
        with psycopg.connect(database.superuser_url) as connection:
            return [
                connection.execute("SELECT * FROM orders ORDER BY order_uid").fetchall(),
                connection.execute(
                    "SELECT topic_id, partition, record_offset, value, code FROM rejects ORDER BY 2, 3"
                ).fetchall(),
            ]

    before = everything()
    [plan, *_] = json.loads(succeed("admin offsets reset --to-earliest --json", environ))
    assert plan["new_next_offset"] == 0 < plan["next_offset"]
    assert {row["lag"] for row in json.loads(succeed("admin lag --json", environ))} == {0}
    assert run("admin offsets reset --to-earliest --execute", environ).returncode == 1
    succeed("admin offsets reset --to-earliest --execute --yes", environ)
    assert sum(row["lag"] for row in json.loads(succeed("admin lag --json", environ))) == 300
    succeed("consumer --exit-at-end", environ)
    assert everything() == before


def test_offsets_cannot_be_moved_while_a_consumer_runs(environ: dict[str, str], tmp_path: Path) -> None:
    succeed("sender --count 10", environ)
    with running("consumer", environ, tmp_path / "log"):
        wait_for(lambda: sum(r["lag"] for r in json.loads(succeed("admin lag --json", environ))) == 0)
        done = run("admin offsets reset --to-earliest --execute --yes", environ)
    assert done.returncode == 2
    assert "stop them first" in done.stderr


def test_forget_deletes_the_order_and_its_reject(environ: dict[str, str], database: Database) -> None:
    succeed("sender --file -", environ, stdin=SAMPLE.rstrip(b"\n") + b"\n" + SAMPLE.replace(b"USD", b"usd"))
    succeed("consumer --exit-at-end", environ)
    uid = orderlib.decode_order(SAMPLE).order_uid
    assert run(f"admin forget {uid}", environ).returncode == 1, "without a terminal it needs --yes"
    succeed(f"admin forget {uid} --yes", environ)
    with psycopg.connect(database.superuser_url) as connection:
        for table in ("orders", "delivery", "payment", "items", "rejects"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,), table


BROKEN = {
    "a setting is missing": ({"ORDERS_DATABASE_URL": "", "ORDERS_READER_URL": ""}, "is not set"),
    "a wrong password": ({}, "password authentication failed"),
    "no such database": ({}, "does not exist"),
    "no such topic": ({"ORDERS_TOPIC": "nowhere"}, "no topic 'nowhere'"),
    "a reserved property": ({"ORDERS_KAFKA_GROUP_ID": "mine"}, "ORDERS_KAFKA_GROUP_ID"),
    "an unknown property": ({"ORDERS_KAFKA_NO_SUCH": "1"}, "no.such"),
    "a bad address": ({"ORDERS_METRICS_BIND": "nonsense"}, "ORDERS_METRICS_BIND"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_configuration_error_is_one_line_and_exit_status_2(environ: dict[str, str], what: str) -> None:
    change, message = BROKEN[what]
    if what == "a wrong password":
        change = {"ORDERS_DATABASE_URL": environ["ORDERS_DATABASE_URL"].replace("password=", "password=not")}
    if what == "no such database":
        change = {"ORDERS_DATABASE_URL": environ["ORDERS_DATABASE_URL"].replace("dbname=", "dbname=not")}
    done = run("consumer", {**environ, **change})
    [line] = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 2
    assert line.startswith("error: ")
    assert message in line
    assert done.stdout == ""


def test_a_database_without_tables_is_an_error_that_names_the_command(
    environ: dict[str, str], empty_database: Database
) -> None:
    done = run("consumer", {**environ, **empty_database.environ()})
    assert done.returncode == 2
    assert "python -m orderlib migrate" in done.stderr


def test_only_bootstrap_ever_connects_as_a_superuser(environ: dict[str, str]) -> None:
    """No other program receives its URL."""
    without = {name: value for name, value in environ.items() if name != "ORDERS_BOOTSTRAP_URL"}
    for program in ("admin migrate", "sender --count 5", "consumer --exit-at-end", "admin reconcile", "admin lag"):
        succeed(program, without)
    assert run("admin bootstrap", without).returncode == 2


def test_rejects_have_key_value_and_headers_unchanged(environ: dict[str, str], database: Database) -> None:
    producer = Producer({"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"]})
    headers: list[tuple[str, bytes | None]] = [("a", b"\xff\x00"), ("a", None), ("b", b""), ("a", b"again")]
    records: list[tuple[bytes | None, bytes | None]] = [(None, b"\x00\xff"), (b"", b""), (b"\xfe", None)]
    for key, value in records:
        producer.produce(environ["ORDERS_TOPIC"], value, key=key, partition=0, headers=[*headers])
    producer.flush()
    succeed("consumer --exit-at-end", environ)
    with psycopg.connect(database.superuser_url) as connection:
        rows = connection.execute("SELECT key, value, headers FROM rejects ORDER BY record_offset").fetchall()
    assert [(key, value) for key, value, _ in rows] == records
    expected = [{"key": k, "value": v if v is None else base64.b64encode(v).decode()} for k, v in headers]
    assert all(stored == expected for _, _, stored in rows)
