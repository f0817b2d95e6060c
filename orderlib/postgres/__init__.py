"""The only room that knows psycopg."""

from orderlib.postgres.async_repository import AsyncPostgresOrderReader
from orderlib.postgres.repository import PostgresOrderRepository

__all__ = ["AsyncPostgresOrderReader", "PostgresOrderRepository"]
