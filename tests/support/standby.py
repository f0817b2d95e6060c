"""A hot standby of a PostgreSQL in the sandbox, by streaming replication."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import psycopg
from psycopg.conninfo import make_conninfo

from sandbox.postgres import PostgresServer


class QuietPostgres(PostgresServer):
    """A primary without autovacuum, which would cause more recovery conflicts."""

    settings: ClassVar[dict[str, str]] = {"autovacuum": "off", "shared_buffers": "16MB"}

    def _command(self, folder: Path) -> Sequence[str]:
        return [*super()._command(folder), *(f"--{name}={value}" for name, value in self.settings.items())]


class Standby(QuietPostgres):
    """A hot standby, created by ``pg_basebackup``. It cancels each read that conflicts with replay at once."""

    settings: ClassVar[dict[str, str]] = {
        **QuietPostgres.settings,
        "max_standby_streaming_delay": "0",
        "max_standby_archive_delay": "0",
        "wal_retrieve_retry_interval": "100ms",
    }

    def __init__(self, primary: PostgresServer) -> None:
        super().__init__()
        self._primary = primary
        self._password = primary._password
        self._installation = primary._installation
        #: Whether it streams from the primary; if not, it replays only what it has. For the next start.
        self.streams = True

    def _prepare(self, folder: Path) -> None:
        passwords = folder / "passwords"
        passwords.write_text(f"127.0.0.1:{self._primary.port}:*:postgres:{self._password}\n")
        passwords.chmod(0o600)
        if self._user is not None:
            shutil.chown(passwords, self._user)
        source = make_conninfo(host="127.0.0.1", port=self._primary.port, user="postgres", passfile=str(passwords))
        self._run(
            [
                str(self._installation / "bin" / "pg_basebackup"),
                *("--dbname", source, "--pgdata", str(folder / "data"), "--checkpoint=fast", "--no-sync"),
                "--write-recovery-conf",
            ],
            folder / "basebackup.log",
        )

    def _command(self, folder: Path) -> Sequence[str]:
        return [*super()._command(folder), *(() if self.streams else ("--primary_conninfo=",))]

    def _finish_first_start(self) -> None:
        """Create nothing: every database comes from the primary."""

    def execute(self, statement: str, values: Sequence[object] = ()) -> list[tuple[object, ...]]:
        """Run a statement as the superuser, and return its rows."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values)
            return cursor.fetchall() if cursor.description else []
