"""From an empty database to stored orders with what `pip install` brings: ``bootstrap``, ``migrate``, ``connect``."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import orderlib
from orderlib import ConfigurationError, DatabaseUnavailable, Outcome
from orderlib.postgres.privileges import MIGRATOR, READER, WRITER
from tests.support.databases import Database, role_passwords
from tests.support.repository_contract import SAMPLE_ORDER


def bootstrap(database: Database) -> orderlib.BootstrapResult:
    passwords = role_passwords(database)
    return orderlib.bootstrap(
        database.superuser_url,
        migrator_password=passwords[MIGRATOR],
        writer_password=passwords[WRITER],
        reader_password=passwords[READER],
    )


def test_two_calls_prepare_an_empty_database(empty_database: Database) -> None:
    assert bootstrap(empty_database).remaining == ()
    seen: list[str] = []
    applied = orderlib.migrate(empty_database.migrator_url, on_applied=seen.append)
    assert applied == seen
    assert applied[0] == "0001_orders.sql"
    with orderlib.connect(empty_database.writer_url) as repository:
        assert repository.save(SAMPLE_ORDER) is Outcome.STORED
    with orderlib.connect(empty_database.reader_url) as repository:
        assert repository.get(SAMPLE_ORDER.order_uid) == SAMPLE_ORDER


def test_a_repeated_set_up_changes_nothing(database: Database) -> None:
    with orderlib.connect(database.writer_url) as repository:
        repository.save(SAMPLE_ORDER)
        bootstrap(database)
        assert bootstrap(database) == orderlib.BootstrapResult(corrected=(), remaining=())
        assert orderlib.migrate(database.migrator_url) == []
        assert repository.get(SAMPLE_ORDER.order_uid) == SAMPLE_ORDER


def test_bootstrap_without_passwords_leaves_them_unchanged(database: Database) -> None:
    orderlib.bootstrap(database.superuser_url)
    with orderlib.connect(database.writer_url), orderlib.connect(database.reader_url):
        assert orderlib.migrate(database.migrator_url) == []


def test_a_migration_restores_a_privilege_and_says_so(database: Database) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("REVOKE INSERT ON payment FROM orders_writer")
    messages: list[str] = []
    assert orderlib.migrate(database.migrator_url, on_message=messages.append) == []
    assert any("payment" in message for message in messages), messages


@pytest.mark.parametrize("role", ["writer_url", "reader_url"])
def test_a_role_that_may_not_set_up_is_refused_and_nothing_changes(empty_database: Database, role: str) -> None:
    bootstrap(empty_database)
    url = getattr(empty_database, role)
    with pytest.raises(ConfigurationError):
        orderlib.migrate(url)
    with pytest.raises(ConfigurationError):
        orderlib.bootstrap(url, writer_password="another")
    with pytest.raises(ConfigurationError, match=r"schema is at migration 0, .*: run `python -m orderlib migrate`"):
        orderlib.connect(empty_database.writer_url)


def test_an_unavailable_server_is_a_transient_error() -> None:
    for call in (orderlib.migrate, orderlib.bootstrap):
        with pytest.raises(DatabaseUnavailable):
            call("postgresql://127.0.0.1:1/orders")


def test_a_password_of_another_type_is_refused_before_anything_changes(empty_database: Database) -> None:
    with pytest.raises(TypeError, match="password of orders_reader"):
        orderlib.bootstrap(empty_database.superuser_url, reader_password=b"bytes")  # type: ignore[arg-type]  # a wrong type


@pytest.mark.parametrize("password", ["", "SECRET\0WORD", "SECRET\ud800WORD"])
def test_a_password_that_libpq_cannot_use_is_refused_before_anything_changes(database: Database, password: str) -> None:
    with pytest.raises(ConfigurationError, match="the password of orders_reader ") as refusal:
        orderlib.bootstrap(database.superuser_url, writer_password="another", reader_password=password)
    assert not re.search("SECRET|WORD", str(refusal.value))
    with orderlib.connect(database.writer_url), orderlib.connect(database.reader_url):
        pass


@pytest.mark.parametrize("program", ["orderlib", "services.admin"])
@pytest.mark.parametrize("password", ["", "SECRET%00WORD", "SECRET%ED%A0%80WORD", "SECRET\udcffWORD"])
def test_the_command_names_the_role_whose_password_libpq_cannot_use(
    database: Database, program: str, password: str
) -> None:
    environ = {**os.environ, **database.environ()}
    environ["ORDERS_READER_URL"] = f"postgresql://orders_reader:{password}@127.0.0.1/orders"
    done = subprocess.run(
        [sys.executable, "-m", program, "bootstrap"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ORDERS_READER_URL")
    assert "orders_reader" in line
    assert not re.search("SECRET|WORD", line)
    with orderlib.connect(database.reader_url):
        pass


def test_the_command_prepares_an_empty_database(empty_database: Database) -> None:
    environ = {**os.environ, **empty_database.environ()}

    def run(command: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "orderlib", command], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    assert run("bootstrap")[-1] == "set up roles orders_owner, orders_migrator, orders_writer, orders_reader"
    first, *_, last = run("migrate")
    assert first == "applied 0001_orders.sql"
    assert run("migrate") == [last]
    with orderlib.connect(empty_database.writer_url) as repository:
        assert repository.save(SAMPLE_ORDER) is Outcome.STORED


@pytest.mark.parametrize("role", ["stranger", "orders_writer"])
def test_the_command_refuses_a_url_of_another_role(empty_database: Database, role: str) -> None:
    stranger = make_conninfo(empty_database.reader_url, user=role)
    environ = {**os.environ, **empty_database.environ(), "ORDERS_READER_URL": stranger}
    done = subprocess.run(
        [sys.executable, "-m", "orderlib", "bootstrap"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ORDERS_READER_URL must log in as orders_reader")
    assert str(conninfo_to_dict(stranger)["password"]) not in done.stderr
