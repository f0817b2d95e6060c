"""Everything that uses PostgreSQL. Only this package imports psycopg."""

from orderlib.postgres.async_repository import AsyncPostgresOrderRepository
from orderlib.postgres.repository import PostgresOrderRepository

__all__ = ["AsyncPostgresOrderRepository", "PostgresOrderRepository"]
