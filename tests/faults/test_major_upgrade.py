"""A major upgrade of PostgreSQL, as docs/upgrade-postgresql.md describes it. The offsets move with the orders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import psycopg
import pytest

from sandbox import PostgresServer, Sandbox
from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.consumer_process import consuming
from tests.support.databases import bootstrap, on_server
from tests.support.programs import succeed
from tests.support.sending import Sender, uids
from tests.support.waiting import wait_for

#: The folder of an older PostgreSQL with all its programs. Without it: Debian's newest from version 16 on.
OLD = "TESTS_OLD_POSTGRES"


def old_installation() -> Path | None:
    if OLD in os.environ:
        return Path(os.environ[OLD])
    folders = Path("/usr/lib/postgresql").glob("*/bin/pg_controldata")
    versions = sorted(int(path.parents[1].name) for path in folders if path.parents[1].name.isdecimal())
    older = [version for version in versions if 16 <= version < 18]
    return Path(f"/usr/lib/postgresql/{older[-1]}") if older else None


class OldPostgres(PostgresServer):
    def __init__(self, installation: Path) -> None:
        super().__init__()
        self._installation = installation

    def _prepare(self, folder: Path) -> None:
        init(self, folder, ())


class UpgradedPostgres(PostgresServer):
    """The data of another server, which is stopped. It has the same port."""

    def __init__(self, old: OldPostgres) -> None:
        super().__init__()
        self._old = old
        self._password, self.port = old._password, old.port

    def _prepare(self, folder: Path) -> None:
        if not self._may_run(self._installation):
            self._installation = self._copy_installation(folder)
        init(self, folder, ("--no-data-checksums",))
        passwords = folder / "passwords"
        passwords.write_text(f"*:*:*:postgres:{self._password}\n")
        passwords.chmod(0o600)
        if self._user is not None:
            shutil.chown(passwords, self._user)
        self._run(
            [
                *("env", f"PGPASSFILE={passwords}", str(self._installation / "bin" / "pg_upgrade")),
                *(
                    "--old-bindir",
                    str(self._old._installation / "bin"),
                    "--old-datadir",
                    str(self._old.folder / "data"),
                ),
                *("--new-bindir", str(self._installation / "bin"), "--new-datadir", str(folder / "data")),
                *("--username", "postgres", "--link"),
            ],
            folder / "pg_upgrade.log",
        )

    def _finish_first_start(self) -> None:
        """Create nothing: every database comes from the old server."""


def init(server: PostgresServer, folder: Path, options: Sequence[str]) -> None:
    """Create a cluster with options that every version knows."""
    password_file = folder / "password"
    password_file.write_text(server._password)
    if server._user is not None:
        shutil.chown(password_file, server._user)
    server._run(
        [
            *(str(server._installation / "bin" / "initdb"), "--pgdata", str(folder / "data"), "--no-sync"),
            *("--username", "postgres", "--pwfile", str(password_file), "--auth", "scram-sha-256"),
            *("--encoding", "UTF8", "--locale", "C", *options),
        ],
        folder / "initdb.log",
    )
    with (folder / "data" / "postgresql.conf").open("a") as file:
        file.write("listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\nmax_connections = 50\n")


#: `bootstrap` has revoked this. Its parameters are others since version 17, so pg_upgrade could not revoke it again.
RESTORE_PRIVILEGES = """
SELECT format('GRANT EXECUTE ON FUNCTION %s TO PUBLIC', oid::regprocedure) FROM pg_proc
WHERE proname = 'pg_logical_emit_message'
"""


@pytest.mark.faults
@pytest.mark.skipif(old_installation() is None, reason=f"no older PostgreSQL: set {OLD} to its folder")
def test_the_consumer_continues_at_its_offsets_after_a_major_upgrade(
    sandbox: Sandbox, topic: str, environ: dict[str, str]
) -> None:
    installation = old_installation()
    assert installation is not None
    with OldPostgres(installation) as old:
        urls = on_server(old)
        environ = {**environ, **urls.environ()}
        bootstrap(urls)
        with psycopg.connect(urls.superuser_url) as connection:
            [(before,)] = connection.execute("SHOW server_version_num").fetchall()
        succeed("admin migrate", environ)
        sender = Sender(sandbox.kafka.bootstrap_servers, topic)
        sender.send_orders(uids("order", 2_000))
        sender.send_bad(b"[")
        succeed("consumer --exit-at-end", environ)
        sender.send_orders(uids("order", 500), version=2)
        with psycopg.connect(urls.superuser_url) as connection:
            for (command,) in connection.execute(RESTORE_PRIVILEGES).fetchall():
                connection.execute(command)
        old.stop()
        with UpgradedPostgres(old) as new:
            with psycopg.connect(new.superuser_url) as connection:
                [(after,)] = connection.execute("SHOW server_version_num").fetchall()
            print(f"from {before} to {after}")
            assert int(before) // 10_000 < int(after) // 10_000
            succeed("admin bootstrap", environ)
            succeed("admin migrate", environ)
            with consuming(environ) as consumer:
                wait_until_handled(sender.manifest, urls)
                assert consumer.stop() == 0
                assert consumer.events("stored_offset_changed") == []
            assert_all_accounted_for(sender.manifest, urls, environ)


class ReplicatedPostgres(OldPostgres):
    def _command(self, folder: Path) -> Sequence[str]:
        return [*super()._command(folder), "--wal_level=logical"]


TABLES = (
    "orders, delivery, payment, items, order_originals, erased, forgotten, rejects, consumer_groups, consumer_offsets"
)


@pytest.mark.faults
@pytest.mark.skipif(old_installation() is None, reason=f"no older PostgreSQL: set {OLD} to its folder")
def test_the_consumer_continues_on_a_server_that_was_filled_by_logical_replication(
    sandbox: Sandbox, topic: str, environ: dict[str, str]
) -> None:
    installation = old_installation()
    assert installation is not None
    with ReplicatedPostgres(installation) as old, PostgresServer() as new:
        of_old, of_new = on_server(old), on_server(new)
        for urls in (of_old, of_new):
            bootstrap(urls)
            succeed("admin migrate", {**environ, **urls.environ()})
        sender = Sender(sandbox.kafka.bootstrap_servers, topic)
        sender.send_orders(uids("order", 2_000))
        sender.send_bad(b"[")
        with consuming({**environ, **of_old.environ()}) as consumer:
            with psycopg.connect(old.superuser_url, autocommit=True) as connection:
                connection.execute(f"CREATE PUBLICATION upgrade FOR TABLE {TABLES}".encode())
            with psycopg.connect(new.superuser_url, autocommit=True) as connection:
                connection.execute(f"CREATE SUBSCRIPTION upgrade CONNECTION '{old.superuser_url}' PUBLICATION upgrade")
                sender.send_orders(uids("order", 1_000), version=2)
                wait_until_handled(sender.manifest, of_old)
                states = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'"
                wait_for(lambda: connection.execute(states).fetchone() == (0,), 60)
            assert consumer.stop() == 0
        with psycopg.connect(old.superuser_url) as connection:
            received = "SELECT bool_and(confirmed_flush_lsn >= pg_current_wal_lsn()) FROM pg_replication_slots"
            wait_for(lambda: connection.execute(received).fetchone() == (True,), 60)
        with psycopg.connect(new.superuser_url, autocommit=True) as connection:
            connection.execute("DROP SUBSCRIPTION upgrade")
        sender.send_orders(uids("order", 500), version=3)
        environ = {**environ, **of_new.environ()}
        with consuming(environ) as consumer:
            wait_until_handled(sender.manifest, of_new)
            assert consumer.stop() == 0
            assert consumer.events("stored_offset_changed") == []
        assert_all_accounted_for(sender.manifest, of_new, environ)
