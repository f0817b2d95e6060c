"""`bootstrap` corrects what its role may correct and names the rest."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import attrs
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import orderlib
from orderlib import ConfigurationError, DatabaseUnavailable, connect, decode_order
from orderlib.ingestion.records import PreparedOrder, TopicPartition
from orderlib.postgres import ddl, migrate, queries
from orderlib.postgres.connections import open_connection
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.schema import LATEST_MIGRATION, migrations
from orderlib.postgres.writes import store
from orderlib.testing import SAMPLE
from sandbox import PostgresServer
from tests.support.databases import Database, bootstrap, on_server

#: Whatever differs from what it must be.
DISORDER = """
CREATE ROLE stranger;
ALTER ROLE orders_reader CREATEDB REPLICATION;
ALTER ROLE orders_owner LOGIN;
ALTER ROLE orders_migrator VALID UNTIL '2001-01-01';
ALTER ROLE orders_reader CONNECTION LIMIT 0;
GRANT pg_read_all_data TO orders_reader;
GRANT orders_owner TO stranger;
GRANT orders_owner TO orders_writer;
GRANT TEMPORARY, CREATE ON DATABASE orders TO PUBLIC;
GRANT TEMPORARY ON DATABASE orders TO orders_reader;
GRANT CREATE ON SCHEMA public TO PUBLIC, orders_writer;
GRANT SELECT ON orders TO PUBLIC;
GRANT ALL ON items TO stranger WITH GRANT OPTION;
GRANT UPDATE ON delivery TO orders_writer;
GRANT SELECT (faults) ON rejects TO orders_reader;
REVOKE INSERT ON payment FROM orders_writer;
GRANT EXECUTE ON FUNCTION lo_creat(integer) TO PUBLIC;
"""

STATE = """
SELECT 'role', rolname::text,
    concat_ws(' ', rolsuper, rolcreatedb, rolcreaterole, rolreplication, rolbypassrls, rolcanlogin)
FROM pg_roles WHERE rolname ~ '^orders'
UNION ALL SELECT 'member', roleid::regrole::text,
    concat_ws(' ', member::regrole, set_option, inherit_option, admin_option)
FROM pg_auth_members WHERE roleid::regrole::text ~ '^orders' OR member::regrole::text ~ '^orders'
UNION ALL SELECT 'database', grantee::regrole::text, privilege_type
FROM pg_database, aclexplode(datacl) WHERE datname = current_database()
UNION ALL SELECT 'schema', grantee::regrole::text, privilege_type
FROM pg_namespace, aclexplode(nspacl) WHERE nspname = 'public'
UNION ALL SELECT 'table ' || relname, grantee::regrole::text, privilege_type || is_grantable
FROM pg_class, aclexplode(relacl) WHERE relnamespace = 'public'::regnamespace
UNION ALL SELECT 'column ' || attrelid::regclass || '.' || attname, grantee::regrole::text, privilege_type
FROM pg_attribute, aclexplode(attacl) WHERE attrelid::regclass::text !~ '^pg_'
UNION ALL SELECT 'function', proname, grantee::regrole::text
FROM pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner)))
WHERE proname ~ '^lo_' OR proname IN ('lowrite', 'loread', 'claim_consumer_group', 'pg_logical_emit_message')
ORDER BY 1, 2, 3
"""


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server for one test, because roles belong to the server."""
    with PostgresServer() as running:
        yield running


def set_up(database: Database) -> orderlib.BootstrapResult:
    result = bootstrap(database)
    orderlib.migrate(database.migrator_url)
    return result


def state(superuser: psycopg.Connection) -> list[tuple[object, ...]]:
    return superuser.execute(STATE.encode()).fetchall()


def test_a_superuser_corrects_every_difference_and_says_which(server: PostgresServer) -> None:
    database = on_server(server)
    assert set_up(database).remaining == ()
    with psycopg.connect(server.superuser_url, autocommit=True) as superuser:
        wanted = state(superuser)
        assert not [row for row in wanted if row[0] in {"database", "schema"} and row[1:] == ("-", "CREATE")]
        assert not [row for row in wanted if row[0] == "function" and row[2] == "-"]
        superuser.execute(DISORDER.encode())
        result = set_up(database)
        assert result.remaining == ()
        for text in ("CREATEDB", "REPLICATION", "LOGIN", "pg_read_all_data", "stranger", "TEMPORARY", "lo_creat"):
            assert any(text in line for line in result.corrected), text
        assert state(superuser) == wanted
        assert set_up(database).corrected == ()


def test_a_role_that_could_not_log_in_can_afterwards(server: PostgresServer) -> None:
    database = on_server(server)
    bootstrap(database)
    for variable, change in (
        ("migrator_url", "VALID UNTIL '2001-01-01'"),
        ("writer_url", "CONNECTION LIMIT 0"),
        ("reader_url", "NOLOGIN VALID UNTIL '2001-01-01' CONNECTION LIMIT 0"),
    ):
        url = getattr(database, variable)
        role = conninfo_to_dict(url)["user"]
        with psycopg.connect(server.superuser_url, autocommit=True) as superuser:
            superuser.execute(f"ALTER ROLE {role} {change}".encode())
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url)
        corrected = (f"role {role} may have no connection: ALTER ROLE {role} CONNECTION LIMIT -1",)
        assert bootstrap(database).corrected == (corrected if "LIMIT" in change else ())
        psycopg.connect(url).close()


def test_a_low_connection_limit_and_an_expired_password_are_reported_and_stay(server: PostgresServer) -> None:
    database = on_server(server)
    bootstrap(database)
    with psycopg.connect(server.superuser_url, autocommit=True) as superuser:
        superuser.execute("ALTER ROLE orders_reader CONNECTION LIMIT 10")
        superuser.execute("ALTER ROLE orders_writer CONNECTION LIMIT 3 VALID UNTIL '2001-01-01'")
    limit, expired = sorted(orderlib.bootstrap(server.superuser_url).remaining)
    assert limit.startswith("role orders_reader may have only 10 connections, but the programs use 11 or more: ")
    assert expired == "the password of role orders_writer has expired: run bootstrap with a password for it"
    assert bootstrap(database).remaining == (limit,)
    psycopg.connect(database.writer_url).close()


def test_an_administrator_who_owns_the_database_need_not_be_a_superuser(server: PostgresServer) -> None:
    password = secrets.token_hex(8)
    with psycopg.connect(server.superuser_url, autocommit=True) as superuser:
        superuser.execute(f"CREATE ROLE manager LOGIN CREATEROLE PASSWORD '{password}'".encode())
        superuser.execute("ALTER DATABASE orders OWNER TO manager")
        database = on_server(server, server.url("manager", password))
        [remaining] = set_up(database).remaining
        assert "large objects" in remaining
        assert "REVOKE EXECUTE ON FUNCTION lo_" in remaining
        wanted = state(superuser)
        superuser.execute("GRANT SELECT ON orders TO PUBLIC; GRANT TEMPORARY ON DATABASE orders TO PUBLIC")
        superuser.execute("ALTER ROLE orders_reader SUPERUSER")
        # A superuser cannot be altered by this administrator, not even its password.
        with pytest.raises(ConfigurationError, match="role manager may not"):
            bootstrap(database)
        superuser.execute("ALTER ROLE orders_reader NOSUPERUSER")
        result = set_up(database)
        assert len(result.corrected) == 2, result.corrected
        assert state(superuser) == wanted
        # Only a superuser may revoke this. The programs work all the same.
        superuser.execute("GRANT pg_read_all_data TO orders_reader")
        assert any("REVOKE pg_read_all_data" in text for text in bootstrap(database).remaining)
    consumer = ConsumerStore(database.writer_url, "group", lambda: 0.0)
    consumer.claim_database()
    partition = TopicPartition("orders", 0)
    assert consumer.start_partitions({"orders": "topic"}, {partition: 3}) == {partition: 3}
    consumer.close()
    order = decode_order(SAMPLE)
    with connect(database.writer_url) as writer:
        writer.save_many([order])
    with connect(database.reader_url) as reader:
        assert reader.get(order.order_uid) == order


@pytest.mark.parametrize("owner_may_use", [True, False])
def test_an_administrator_without_usage_on_the_schema_checks_the_privileges_or_names_the_schema(
    server: PostgresServer, *, owner_may_use: bool
) -> None:
    password = secrets.token_hex(8)
    with psycopg.connect(server.superuser_url, autocommit=True) as superuser:
        superuser.execute(f"CREATE ROLE manager LOGIN CREATEROLE PASSWORD '{password}'".encode())
        superuser.execute("ALTER DATABASE orders OWNER TO manager")
        database = on_server(server, server.url("manager", password))
        set_up(database)
        wanted = state(superuser)
        superuser.execute(
            "CREATE ROLE stranger; ALTER SCHEMA public OWNER TO stranger; GRANT SELECT ON orders TO PUBLIC"
        )
        superuser.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        if not owner_may_use:
            superuser.execute("REVOKE ALL ON SCHEMA public FROM orders_owner")
            superuser.execute("GRANT CREATE ON SCHEMA public TO orders_owner")
        if owner_may_use:
            result = bootstrap(database)
            assert any("orders" in text and "PUBLIC" in text for text in result.corrected), result.corrected
            superuser.execute("ALTER SCHEMA public OWNER TO pg_database_owner")
            assert {row for row in state(superuser) if str(row[0]).startswith("table")} == {
                row for row in wanted if str(row[0]).startswith("table")
            }
        else:
            with pytest.raises(ConfigurationError, match="orders_owner was not granted USAGE on schema public"):
                bootstrap(database)


def test_create_of_public_is_revoked_only_on_schemas_that_are_used(database: Database) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("CREATE SCHEMA tools; GRANT CREATE ON SCHEMA public, tools TO PUBLIC")
        result = bootstrap(database)
        assert [text for text in result.corrected if "CREATE on schema" in text] == [
            "PUBLIC has CREATE on schema public: REVOKE CREATE ON SCHEMA public FROM PUBLIC CASCADE"
        ]
        [remaining] = result.remaining
        assert "CREATE on schema tools" in remaining
        [(in_tools, in_public)] = superuser.execute(
            "SELECT has_schema_privilege('orders_reader', 'tools', 'CREATE'), "
            "has_schema_privilege('orders_reader', 'public', 'CREATE')"
        ).fetchall()
        assert (in_tools, in_public) == (True, False)


def test_a_reader_with_the_former_advisory_lock_blocks_no_migration(empty_database: Database) -> None:
    bootstrap(empty_database)
    with psycopg.connect(empty_database.reader_url) as reader:
        reader.execute("SELECT pg_advisory_xact_lock(x'6f7264657273'::bigint)")
        assert len(orderlib.migrate(empty_database.migrator_url)) == LATEST_MIGRATION
        bootstrap(empty_database)


def test_migrate_names_who_holds_its_lock_and_gives_up(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap(empty_database)
    with monkeypatch.context() as first_only:
        one = dict(list(migrations().items())[:1])
        first_only.setattr(migrate, "migrations", lambda: one)
        orderlib.migrate(empty_database.migrator_url)
    monkeypatch.setattr(ddl, "LOCK_WITHIN_S", 3.0)
    messages: list[str] = []
    with psycopg.connect(make_conninfo(empty_database.superuser_url, application_name="holder")) as holder:
        holder.execute("LOCK TABLE schema_migrations IN SHARE MODE")
        named = rf"held by pid {holder.info.backend_pid} \(role postgres, application 'holder'\)"
        with pytest.raises(DatabaseUnavailable, match=named):
            orderlib.migrate(empty_database.migrator_url, on_message=messages.append)
    [message] = messages
    assert "application 'holder'" in message


def test_a_reader_with_every_lock_that_it_may_take_does_not_delay_migrate(
    empty_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap(empty_database)
    # The next one alters orders, which has to wait for its readers.
    every = dict(list(migrations().items())[:5])
    monkeypatch.setattr(migrate, "migrations", lambda: every)
    with monkeypatch.context() as first_only:
        first_only.setattr(migrate, "migrations", lambda: dict(list(every.items())[:2]))
        orderlib.migrate(empty_database.migrator_url)
    monkeypatch.setattr(ddl, "LOCK_WITHIN_S", 3.0)
    with psycopg.connect(make_conninfo(empty_database.reader_url, application_name="report")) as reader:
        for mode in lock_modes_of_the_reader(reader):
            reader.execute(f"LOCK TABLE schema_migrations, orders, delivery, payment, items IN {mode} MODE".encode())
        reader.execute("SELECT * FROM consumer_offsets, orders, items, schema_migrations")
        reader.execute("SELECT pg_advisory_xact_lock(key) FROM generate_series(-100, 100) AS key")
        reader.execute("SELECT pg_advisory_xact_lock(oid::bigint) FROM pg_class WHERE oid >= 16384")
        messages: list[str] = []
        assert len(orderlib.migrate(empty_database.migrator_url, on_message=messages.append)) == len(every) - 2
        bootstrap(empty_database)
        assert messages == []

        # A later migration may change a table that is being read. It gives up and names the reader.
        change = "LOCK TABLE orders IN ACCESS EXCLUSIVE MODE"
        monkeypatch.setattr(queries, "LOCK_SCHEMA", change)
        named = (
            rf"held by pid {reader.info.backend_pid} \(role orders_reader, application 'report'\); this step was rolled"
        )
        began_s = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match=named):
            orderlib.migrate(empty_database.migrator_url)
        # PostgreSQL ends each wait, so this is bounded.
        assert time.monotonic() - began_s < 30


def lock_modes_of_the_reader(reader: psycopg.Connection) -> list[str]:
    """Return the modes of LOCK TABLE that the reader's privileges allow."""
    allowed = []
    for mode in ("ACCESS SHARE", "ROW SHARE", "ROW EXCLUSIVE", "SHARE", "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE"):
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege), reader.transaction(force_rollback=True):
            reader.execute(f"LOCK TABLE schema_migrations IN {mode} MODE".encode())
            allowed.append(mode)
    assert allowed == ["ACCESS SHARE"]
    return allowed


def test_databases_of_one_server_can_be_set_up_at_once(server: PostgresServer) -> None:
    """Roles belong to the server. A database's name may need quotes."""
    names = ["orders", "Orders 2", 'with "quotes"', "per%cent"]
    with psycopg.connect(server.superuser_url, autocommit=True) as superuser:
        for name in names[1:]:
            superuser.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    one = on_server(server)
    databases = [
        Database(**{field: make_conninfo(url, dbname=name) for field, url in attrs.asdict(one).items()})
        for name in names
    ]
    barrier = threading.Barrier(len(databases))

    def start(database: Database) -> orderlib.BootstrapResult:
        barrier.wait()
        return set_up(database)

    with ThreadPoolExecutor(len(databases)) as threads:
        assert [result.remaining for result in threads.map(start, databases)] == [()] * len(databases)
    order = decode_order(SAMPLE)
    for database in databases:
        assert set_up(database).corrected == ()
        with connect(database.writer_url) as writer:
            writer.save_many([order])
        with connect(database.reader_url) as reader:
            assert reader.get(order.order_uid) == order


@pytest.mark.parametrize("may_use", [True, False])
def test_a_schema_outside_the_search_path_is_distinguished_from_a_missing_one(
    database: Database, *, may_use: bool
) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
        superuser.execute("ALTER SCHEMA public RENAME TO shop")
        if not may_use:
            superuser.execute("REVOKE USAGE ON SCHEMA shop FROM PUBLIC, orders_reader")
    expected = "search_path of role orders_reader" if may_use else "role orders_reader lacks USAGE"
    with pytest.raises(ConfigurationError, match=f"the tables are in schema shop, .*{expected}"):
        connect(database.reader_url)
    with pytest.raises(ConfigurationError, match="in schema shop"):
        orderlib.migrate(database.migrator_url)


def test_stored_at_is_never_before_first_stored_at(database: Database) -> None:
    """A transaction that began earlier replaces an order that a later one stored first."""
    order = decode_order(SAMPLE)
    with open_connection(database.writer_url, application_name="tests") as early, early.transaction():
        early.execute("SELECT now()")
        with connect(database.writer_url) as other:
            other.save_many([order])
        store(early, [PreparedOrder.of(attrs.evolve(order, sm_id=order.sm_id + 1), pack_rows=pack_rows)])
    with psycopg.connect(database.superuser_url) as superuser:
        assert superuser.execute("SELECT stored_at >= first_stored_at FROM orders").fetchall() == [(True,)]
