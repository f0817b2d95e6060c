"""Somebody else's locks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from tests.support.databases import Database

#: All that a consumer writes orders into.
TABLE = "LOCK TABLE orders"
#: The rows that it moves first in each batch.
FENCE = "SELECT FROM consumer_offsets FOR UPDATE"


@contextmanager
def locked(database: Database, statement: str) -> Iterator[psycopg.Connection]:
    """A stranger's transaction that holds what the statement locks."""
    with psycopg.connect(database.superuser_url) as stranger:
        stranger.execute(statement)
        yield stranger
        stranger.rollback()
