"""The only room that knows psycopg."""

from orderlib.postgres.async_repository import AsyncPostgresOrderRepository
from orderlib.postgres.repository import PostgresOrderRepository

__all__ = ["AsyncPostgresOrderRepository", "PostgresOrderRepository"]
