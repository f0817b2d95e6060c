"""A full disk of PostgreSQL is an outage, and rejects no record."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from sandbox import PostgresServer
from tests.support.accounting import assert_all_accounted_for, wait_until_handled
from tests.support.consumer_process import consuming
from tests.support.databases import Database, on_server, set_up
from tests.support.sending import Sender, uids
from tests.support.waiting import wait_for

pytestmark = pytest.mark.faults


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    """Return a separate server, because it cannot start again without the small disk."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def database(postgres: PostgresServer) -> Database:
    database = on_server(postgres)
    set_up(database)
    return database


@pytest.fixture
def small_disk(postgres: PostgresServer) -> Iterator[Path]:
    """A disk of 4 MB that PostgreSQL may write to."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        disk = Path(folder) / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
        if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
            pytest.skip("a small disk needs the privilege to mount one")
        shutil.chown(disk, postgres.folder.owner())
        yield disk
        postgres.stop("immediate")
        subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> Path:
    """Fill the disk with one file."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return ballast
    raise AssertionError("the disk has no end")


def test_a_full_disk_is_an_outage_and_rejects_nothing(
    small_disk: Path, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    sender.send_orders(uids("order", 100))
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser, consuming(environ) as consumer:
        wait_until_handled(sender.manifest, database)
        superuser.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
        superuser.execute("ALTER TABLE items SET TABLESPACE small")
        ballast = fill(small_disk)
        sender.send_orders(uids("order", 2000), version=2)
        sender.send_bad(b"{")
        wait_for(lambda: any("53100" in event["reason"] for event in consumer.events("retrying")), 15)
        assert consumer.live
        assert not consumer.ready
        ballast.unlink()
        wait_until_handled(sender.manifest, database)
        assert_all_accounted_for(sender.manifest, database, environ)
        assert consumer.stop() == 0


def test_a_full_disk_does_not_delay_a_stop(
    small_disk: Path, environ: dict[str, str], database: Database, sender: Sender
) -> None:
    with psycopg.connect(database.superuser_url, autocommit=True) as superuser, consuming(environ) as consumer:
        superuser.execute(f"CREATE TABLESPACE small LOCATION '{small_disk}'")
        superuser.execute("ALTER TABLE items SET TABLESPACE small")
        fill(small_disk)
        sender.send_orders(uids("order", 2000))
        wait_for(lambda: bool(consumer.events("retrying")), 15)
        assert consumer.stop() == 0
