"""Prove from Kafka and PostgreSQL alone that no record was lost, stored twice or changed; compare with `reconcile`."""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Iterable, Mapping
from typing import Any

import psycopg
from psycopg.rows import dict_row

from services.admin.__main__ import main as admin
from tests.support.databases import Database
from tests.support.sending import Acknowledged
from tests.support.waiting import wait_for

Manifest = Iterable[Acknowledged]


def next_offsets(database: Database) -> dict[int, int]:
    """Return the stored next offset of each partition. The topic must never have been recreated."""
    with psycopg.connect(database.superuser_url) as connection:
        return dict(connection.execute("SELECT partition, next_offset FROM consumer_offsets").fetchall())


def wait_until_handled(manifest: Manifest, database: Database, within_s: float = 30) -> None:
    """Wait until the group's offsets have passed every acknowledged record."""
    ends: dict[int, int] = {}
    for record in manifest:
        ends[record.partition] = max(ends.get(record.partition, 0), record.offset + 1)

    def is_handled() -> bool:
        there = next_offsets(database)
        return all(there.get(partition, 0) >= end for partition, end in ends.items())

    wait_for(
        is_handled,
        within_s,
        describe=lambda: f"the stored offsets are {next_offsets(database)}, the log ends {ends}",
    )


def assert_all_accounted_for(manifest: Manifest, database: Database, environ: Mapping[str, str]) -> None:
    """Assert that the orders are the last acknowledged valid records, and the rejects all the other records.

    `admin reconcile` must find no discrepancy either. Each order must have been sent to one partition only.
    """
    expected_orders: dict[str, tuple[int, dict[str, Any]]] = {}
    expected_rejects = {}
    for record in sorted(manifest, key=lambda record: (record.partition, record.offset)):
        if record.good:
            assert record.value is not None
            content = json.loads(record.value)
            expected_orders[content["order_uid"]] = (record.partition, content)
        else:
            expected_rejects[record.partition, record.offset] = (record.key, record.value, record.headers)
    stored = stored_orders(database)
    missing, surplus = expected_orders.keys() - stored.keys(), stored.keys() - expected_orders.keys()
    assert not missing, f"{len(missing)} orders are missing, such as {min(missing)}"
    assert not surplus, f"{len(surplus)} orders were never sent, such as {min(surplus)}"
    for order_uid, (partition, content) in expected_orders.items():
        assert stored[order_uid] == _comparable(content), (
            f"{order_uid} of partition {partition} is not its last version"
        )
    assert stored_rejects(database) == expected_rejects
    assert admin(["reconcile"], environ) == 0


def stored_orders(database: Database) -> dict[str, dict[str, Any]]:
    """Return the orders in the four tables, in the shape of the JSON in which they are sent."""
    with psycopg.connect(database.superuser_url, row_factory=dict_row) as connection:
        # One snapshot of all tables: the consumer may be running.
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SET LOCAL TIME ZONE 'UTC'")
        orders = {row["order_uid"]: row for row in connection.execute("SELECT * FROM orders")}
        for part in ("delivery", "payment"):
            for row in connection.execute(f"SELECT * FROM {part}"):
                orders[row.pop("order_uid")][part] = row
        for row in connection.execute("SELECT * FROM items ORDER BY order_uid, line"):
            items = orders[row.pop("order_uid")].setdefault("items", [])
            assert row.pop("line") == len(items)
            items.append(row)
    store_columns = ("content_sha256", "version", "first_stored_at", "stored_at", "has_original")
    for row in orders.values():
        for name in [name for name in row if name in store_columns or name.startswith("source_")]:
            del row[name]
    return orders


def stored_rejects(database: Database) -> dict[tuple[int, int], tuple[bytes | None, bytes | None, Any]]:
    """Return key, value and headers of every reject, by partition and offset."""
    with psycopg.connect(database.superuser_url) as connection:
        rows = connection.execute("SELECT partition, record_offset, key, value, headers FROM rejects").fetchall()
    return {(partition, offset): (key, value, _decoded(headers)) for partition, offset, key, value, headers in rows}


def _decoded(headers: list[dict[str, str | None]] | None) -> list[tuple[str | None, bytes | None]] | None:
    if headers is None:
        return None
    values = ((header["key"], header["value"]) for header in headers)
    return [(key, None if value is None else base64.b64decode(value)) for key, value in values]


def _comparable(content: dict[str, Any]) -> dict[str, Any]:
    return {**content, "date_created": dt.datetime.fromisoformat(content["date_created"])}
