"""Copy all orders into an SQLite file, and afterwards only what has changed.

    python nightly_export.py orders.sqlite3

It needs the reader's URL in ORDERS_READER_URL. All orders are read from one snapshot. Only new and changed ones are
written, and orders that no longer exist are removed. If it fails, the file stays as it was. Memory does not depend on
the number of orders.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from collections import Counter

import orderlib

TABLES = """
CREATE TABLE IF NOT EXISTS orders (
    order_uid TEXT PRIMARY KEY,
    content_sha256 BLOB NOT NULL,
    stored_at TEXT NOT NULL,
    date_created TEXT NOT NULL,
    customer_id TEXT NOT NULL,
    currency TEXT NOT NULL,
    amount INTEGER NOT NULL,
    json BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS items (
    order_uid TEXT NOT NULL REFERENCES orders ON DELETE CASCADE,
    line INTEGER NOT NULL,
    name TEXT NOT NULL,
    brand TEXT NOT NULL,
    total_price INTEGER NOT NULL,
    PRIMARY KEY (order_uid, line)
) STRICT;
CREATE TEMPORARY TABLE seen (order_uid TEXT PRIMARY KEY);
"""


def export(repository: orderlib.OrderRepository, file: sqlite3.Connection) -> Counter[str]:
    """Bring the file up to date in one transaction. Return how many orders were written, unchanged and removed."""
    file.executescript(TABLES)
    file.execute("PRAGMA foreign_keys = ON")
    counts = Counter(written=0, unchanged=0, removed=0)
    with file:
        for stored in repository.stream():
            uid = stored.order.order_uid
            file.execute("INSERT INTO seen VALUES (?)", [uid])
            known = file.execute("SELECT content_sha256 FROM orders WHERE order_uid = ?", [uid]).fetchone()
            if known == (stored.content_sha256,):
                counts["unchanged"] += 1
            else:
                write(stored, file)
                counts["written"] += 1
        removed = file.execute("DELETE FROM orders WHERE order_uid NOT IN (SELECT order_uid FROM seen)")
        counts["removed"] = removed.rowcount
    return counts


def write(stored: orderlib.StoredOrder, file: sqlite3.Connection) -> None:
    """Replace an order and its items."""
    order = stored.order
    file.execute("DELETE FROM orders WHERE order_uid = ?", [order.order_uid])
    file.execute(
        "INSERT INTO orders VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        [
            order.order_uid,
            stored.content_sha256,
            stored.stored_at.isoformat(),
            order.date_created.isoformat(),
            order.customer_id,
            order.payment.currency,
            order.payment.amount,
            orderlib.encode_order(order),
        ],
    )
    file.executemany(
        "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
        [(order.order_uid, line, item.name, item.brand, item.total_price) for line, item in enumerate(order.items)],
    )


def main() -> None:
    """Export into the file that the command names."""
    [path] = sys.argv[1:]
    with (
        orderlib.connect(os.environ["ORDERS_READER_URL"], application_name="nightly-export") as repository,
        contextlib.closing(sqlite3.connect(path)) as file,
    ):
        counts = export(repository, file)
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
