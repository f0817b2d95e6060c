"""Connect to PostgreSQL: repositories with connections of their own."""

from __future__ import annotations

from orderlib.postgres.async_repository import AsyncPostgresOrderRepository
from orderlib.postgres.pool import Pool
from orderlib.postgres.repository import PostgresOrderRepository


def connect(
    url: str, *, application_name: str = "orderlib", max_connections: int = 4, timeout_s: float = 5.0
) -> PostgresOrderRepository:
    """Connect to a database that has the tables, and return a repository for threads.

    ``url`` is any URL that libpq accepts; the reader's is enough for reads. PostgreSQL shows ``application_name`` in
    pg_stat_activity. Every call, also this one, ends within ``timeout_s`` seconds, if necessary with
    DatabaseUnavailable. This includes the wait for a connection while all ``max_connections`` are in use. Two calls
    differ: ``wait_until_handled`` has a limit of its own, and ``stream`` has this one for each page. To save many
    thousands of orders in one call, set a larger ``timeout_s``.

    Raises DatabaseUnavailable, or ConfigurationError for a wrong URL, password, database or schema; ValueError or
    TypeError for a limit that is not positive, or is no number.

    Close the repository, or use it in ``with``. After that, and in a forked process, calls raise ConfigurationError.
    """
    pool = Pool(url, application_name=application_name, max_connections=max_connections, timeout_s=timeout_s)
    return PostgresOrderRepository(pool)


def connect_async(
    url: str,
    *,
    application_name: str = "orderlib",
    max_connections: int = 8,
    timeout_s: float = 5.0,
    connection_timeout_s: float = 1.5,
) -> AsyncPostgresOrderRepository:
    """Return a repository for asyncio that connects when a call needs a connection.

    So it can be created while PostgreSQL is unavailable. It uses at most ``max_connections`` at once. Each new
    connection checks the schema: calls raise ConfigurationError for a wrong URL, password, database or schema. A call
    raises DatabaseUnavailable after ``connection_timeout_s`` without a connection, and after ``timeout_s`` without an
    answer; ``wait_until_handled`` and ``stream`` differ as for ``connect``.

    Raises ConfigurationError for a URL that is not valid, and ValueError or TypeError for a limit that is not positive,
    or is no number.

    Use it in ``async with``, or await ``close``. After that, and in a forked process, calls raise ConfigurationError.
    """
    pool = Pool(
        url,
        application_name=application_name,
        max_connections=max_connections,
        timeout_s=timeout_s,
        connection_timeout_s=connection_timeout_s,
    )
    return AsyncPostgresOrderRepository(pool)
