"""PostgreSQL with Citus: a coordinator with two workers, which every database of the tests uses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
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
            # What is in doubt after the loss of a worker blocks its rows until the daemon asks; usually each minute.
            "citus.recover_2pc_interval": "1s",
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

    def add_database(self, name: str, template: str | None = None) -> None:
        """Create a database on every node: a copy of a template, or an empty one in which the nodes know each other."""
        if template is None:
            template = self._empty_template
        for node in (*self.workers, self):
            with psycopg.connect(node.superuser_url, dbname="postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy".encode())

    @cached_property
    def _empty_template(self) -> str:
        """Creating the extension takes seconds, and copying a database takes less than one."""
        name = "empty_template"
        self.add_database(name, "template1")
        for node in (*self.workers, self):
            with psycopg.connect(node.superuser_url, dbname=name, autocommit=True) as connection:
                connection.execute("CREATE EXTENSION citus")
        self.set_passwords(name, {"postgres": self._password})
        with psycopg.connect(self.superuser_url, dbname=name, autocommit=True) as connection:
            connection.execute("SELECT citus_set_coordinator_host('127.0.0.1', %s)", [self.port])
            for worker in self.workers:
                connection.execute("SELECT citus_add_node('127.0.0.1', %s)", [worker.port])
        self.make_template(name)
        return name

    def make_template(self, name: str) -> None:
        """End the sessions in a database, those of Citus's daemon too, so that it can be copied."""
        for node in (self, *self.workers):
            with psycopg.connect(node.superuser_url, dbname="postgres", autocommit=True) as connection:
                connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
                connection.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [name]
                )

    def set_passwords(self, name: str, passwords: Mapping[str, str]) -> None:
        """Set the passwords with which the nodes connect to each other as these roles."""
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


_REPOSITORY = "tests/integration/test_postgres_repository.py::"
_REFUSAL = f"{_REPOSITORY}test_an_order_that_only_postgresql_refuses_is_named_and_nothing_is_stored"
_CORRUPTION = "tests/e2e/test_reconcile.py::test_a_planted_corruption_is_a_discrepancy_that_names_the_place"
_CHANGE = "tests/e2e/test_reconcile.py::test_a_change_of_any_column_of_any_table_is_a_discrepancy_that_names_the_place"

#: What differs on Citus, and why, by the beginning of a test's id. These tests are expected to fail there.
DIFFERENCES = {
    **dict.fromkeys(
        (
            "tests/e2e/test_consumer.py::test_a_breaker_tripped_by_the_database_names_the_sqlstate",
            *(f"{_REFUSAL}[{case}]" for case in ("empty", "negative", "item", "items")),
        ),
        "a refused row has the SQLSTATE XX000, not 23514",
    ),
    **dict.fromkeys(
        (
            *(f"{_CHANGE}[{number}]" for number in range(3)),
            f"{_CORRUPTION}[content and digest are those of another order]",
            f"{_CORRUPTION}[an order has the position of another one]",
            f"{_CORRUPTION}[an order that was never sent has the position of another one]",
            f"{_CORRUPTION}[an erased order is stored again]",
        ),
        "Citus refuses the statement that plants the corruption: it changes an order_uid, joins, or is not immutable",
    ),
    "tests/integration/test_using.py::test_calls_leave_no_setting": (
        "Citus turns enable_self_join_elimination off in every session that plans a distributed query"
    ),
    "tests/integration/test_tombstones.py::test_a_tombstone_that_postgresql_refuses_is_a_reject": (
        "a local table cannot refer to a distributed one: the superuser's foreign key is not checked"
    ),
}

#: Tests that say nothing about Citus, and why, by the beginning of their ids. They do not run there.
LEFT_OUT = {
    "tests/faults/test_administrators.py::test_time_limits_set_by_an_administrator": (
        "a batch of thousands of orders may take longer than its limit of 0.7 s"
    ),
    "tests/e2e/test_pipeline.py::test_reconcile_has_no_false_discrepancy_while_the_consumer_runs": (
        "a read of several shards has no common snapshot: the documentation says to stop the consumer"
    ),
    **dict.fromkeys(
        (
            f"{_REPOSITORY}test_a_reader_never_sees_a_mixture_of_two_versions[{read}]"
            for read in ("get_many", "list_orders")
        ),
        "a read of several orders has no common snapshot; each order is of one version",
    ),
    "tests/faults/test_read_your_own_writes.py::test_what_was_sent_is_read_after_the_wait": (
        "the coordinator, which has the offsets, commits some milliseconds before the workers"
    ),
    "tests/integration/test_connections.py::test_postgresql_ends_a_statement_before_its_caller_gives_up": (
        "the call ends in time, but its session is closed if the worker ends the statement before the coordinator"
    ),
    **dict.fromkeys(
        (
            "tests/integration/test_search_plans.py",
            "tests/integration/test_read_plans.py::test_a_read_of_several_orders_is_planned_once",
            f"{_REPOSITORY}test_a_page_is_read_along_its_index",
            f"{_REPOSITORY}test_the_items_of_a_page_are_",
        ),
        "they read plans of one server",
    ),
    **dict.fromkeys(
        (
            "tests/faults/test_brokers.py",
            "tests/faults/test_failover.py",
            "tests/faults/test_outages.py",
            "tests/integration/test_standby.py",
        ),
        "they have PostgreSQL servers of their own",
    ),
    **dict.fromkeys(
        (
            "tests/e2e/test_api_process.py",
            "tests/faults/test_api_faults.py",
            "tests/faults/test_kafka_configuration.py",
        ),
        "they are about a program's own connections and settings",
    ),
}
