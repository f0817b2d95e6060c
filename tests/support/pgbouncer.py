"""PgBouncer in front of a database of the sandbox."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import create_connection

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from sandbox.server import free_port
from tests.support.databases import Database, role_passwords

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
STARTS_WITHIN_S = 10.0


@contextmanager
def pgbouncer(database: Database, *, transaction_role: str = "", **settings: str) -> Iterator[dict[str, str]]:
    """Run PgBouncer, in session mode by default, and in transaction mode for one role if it is given.

    Yield the URLs of all roles through it. Skip the test if PgBouncer is not installed.
    """
    if PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed (on Debian: apt-get install pgbouncer)")
    server = conninfo_to_dict(database.superuser_url)
    passwords = {"postgres": str(server["password"]), **role_passwords(database)}
    port = free_port()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "users").write_text("".join(f'"{role}" "{password}"\n' for role, password in passwords.items()))
        options = {
            "listen_addr": "127.0.0.1",
            "listen_port": str(port),
            "unix_socket_dir": "",
            "auth_type": "scram-sha-256",
            "auth_file": str(folder / "users"),
            "pool_mode": "session",
            "server_login_retry": "1",
            "ignore_startup_parameters": "extra_float_digits",
            **settings,
        }
        lines = "".join(f"{key} = {value}\n" for key, value in options.items())
        of_role = f"[users]\n{transaction_role} = pool_mode=transaction\n" if transaction_role else ""
        (folder / "ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={server['port']}\n{of_role}[pgbouncer]\n{lines}", encoding="utf-8"
        )
        for path in (folder / "ini", folder / "users"):
            path.chmod(0o644)
        command = [PGBOUNCER, *(["-u", "nobody"] if Path("/proc/1").owner() == "root" else []), str(folder / "ini")]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_open(port, process, folder / "log")
            yield {
                variable: make_conninfo(url, host="127.0.0.1", port=port)
                for variable, url in database.environ().items()
            }
        finally:
            process.kill()
            process.wait()


def _wait_until_open(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    while True:
        with suppress(OSError):
            create_connection(("127.0.0.1", port), timeout=1).close()
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
