"""The only room that knows psycopg."""

from orderlib.postgres.repository import PostgresOrderRepository

__all__ = ["PostgresOrderRepository"]
