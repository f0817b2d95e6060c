"""PostgreSQL with Citus: a coordinator with two workers, which every database of the tests uses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psycopg
from psycopg import sql

from sandbox.postgres import PostgresServer

WORKERS = 2
SHARDS = 4


class _Node(PostgresServer):
    def __init__(self, installation: Path) -> None:
        super().__init__()
        self._installation = installation

    def _may_run(self, installation: Path) -> bool:  # noqa: ARG002 - it is not the wheel's
        return True

    def _prepare(self, folder: Path) -> None:
        super()._prepare(folder)
        settings = {
            "shared_preload_libraries": "citus",
            "max_prepared_transactions": "200",
            "max_connections": "500",
            "fsync": "off",
            # Tests drop many databases, and each has a daemon.
            "max_worker_processes": "100",
        }
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())


class Coordinator(_Node):
    """The coordinator. It starts and ends with its workers. Connections between nodes need passwords."""

    def __init__(self, installation: Path) -> None:
        super().__init__(installation)
        self.workers = [_Node(installation) for _ in range(WORKERS)]
        for worker in self.workers:
            worker._password = self._password

    def start(self) -> None:
        super().start()
        for worker in self.workers:
            if worker._process is None:
                worker.start()

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        super().close()

    def add_database(self, name: str) -> None:
        """Create a database on every node, and let the nodes know each other in it."""
        for node in (*self.workers, self):
            with psycopg.connect(node.superuser_url, dbname="postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name}".encode())
            with psycopg.connect(node.superuser_url, dbname=name, autocommit=True) as connection:
                connection.execute("CREATE EXTENSION citus")
        self.set_passwords(name, {"postgres": self._password})
        with psycopg.connect(self.superuser_url, dbname=name, autocommit=True) as connection:
            connection.execute("SELECT citus_set_coordinator_host('127.0.0.1', %s)", [self.port])
            for worker in self.workers:
                connection.execute("SELECT citus_add_node('127.0.0.1', %s)", [worker.port])

    def set_passwords(self, name: str, passwords: Mapping[str, str]) -> None:
        """Let the nodes connect to each other as these roles."""
        for node in (*self.workers, self):
            with psycopg.connect(node.superuser_url, dbname=name, autocommit=True) as connection:
                for role, password in passwords.items():
                    connection.execute(
                        "INSERT INTO pg_dist_authinfo (nodeid, rolename, authinfo) VALUES (0, %s, %s)",
                        [role, f"password={password}"],
                    )

    def drop_database(self, name: str) -> None:
        """Drop it on every node, even if clients are still connected."""
        statement = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        for node in (self, *self.workers):
            with psycopg.connect(node.superuser_url, dbname="postgres", autocommit=True) as connection:
                # The daemon of Citus may connect again meanwhile.
                for _ in range(10):
                    with suppress(psycopg.errors.ObjectInUse):
                        connection.execute(statement)
                        break
