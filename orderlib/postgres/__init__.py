"""The only room that knows psycopg."""

from orderlib.postgres.asynchronous import AsyncPostgresOrderReader
from orderlib.postgres.repository import PostgresOrderRepository

__all__ = ["AsyncPostgresOrderReader", "PostgresOrderRepository"]
