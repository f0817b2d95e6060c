"""Hold locks in another session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tests.support.databases import Database

#: Blocks every write of an order.
TABLE = "LOCK TABLE orders"
#: Blocks the first UPDATE of each batch, which moves the stored offsets.
FENCE = "SELECT FROM consumer_offsets FOR UPDATE"


@contextmanager
def locked(database: Database, statement: str) -> Iterator[psycopg.Connection]:
    """Run the statement in a transaction of another session, and yield that session. Roll it back at the end."""
    with psycopg.connect(database.superuser_url) as connection:
        connection.execute(statement)
        yield connection
        connection.rollback()
