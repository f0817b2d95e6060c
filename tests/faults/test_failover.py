"""An asynchronous standby is promoted while a consumer works. What it has not received is lost, offsets included."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Iterator
from random import Random

import attrs
import psutil
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from sandbox import Sandbox
from sandbox.postgres import PostgresServer
from tests.support.accounting import assert_all_accounted_for, next_offsets, wait_until_handled
from tests.support.api_process import serving
from tests.support.consumer_process import consuming
from tests.support.databases import Database, on_server, set_up
from tests.support.sending import Sender, repeating, uids
from tests.support.standby import QuietPostgres, Standby
from tests.support.waiting import wait_for

WITHIN_S = 30.0


@attrs.define
class CurrentPrimary:
    """The primary, which each run replaces by its standby."""

    server: PostgresServer

    def make_database(self) -> str:
        """Create a migrated database. Return its name."""
        name = f"run_{secrets.token_hex(4)}"
        with psycopg.connect(self.server.superuser_url, dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE orders".encode())
        return name


def on_whichever_accepts_writes(name: str, *servers: PostgresServer) -> Database:
    """Return the URLs of a database, on the first of the servers that accepts writes."""
    several = {
        "dbname": name,
        "host": ",".join("127.0.0.1" for _ in servers),
        "port": ",".join(str(server.port) for server in servers),
        "target_session_attrs": "read-write",
    }
    one = attrs.asdict(on_server(servers[0]))
    return Database(**{role: make_conninfo(url, **several) for role, url in one.items()})


@pytest.fixture(scope="module")
def current() -> Iterator[CurrentPrimary]:
    with QuietPostgres() as server:
        set_up(on_server(server))
        current = CurrentPrimary(server)
        yield current
        current.server.close()


def sending_meanwhile(sender: Sender, rng: Random) -> contextlib.AbstractContextManager[None]:
    """Send orders and bad records in the background until the end of the block."""

    def send(count: int) -> None:
        sender.send_orders(rng.sample(uids("order", 300), 60), 100 + count)
        sender.send_bad(b"{")
        time.sleep(rng.uniform(0, 0.05))

    return repeating(send, WITHIN_S)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_what_a_promoted_standby_lacks_is_read_again(
    seed: int, current: CurrentPrimary, sandbox: Sandbox, topic: str, environ: dict[str, str]
) -> None:
    rng = Random(seed)
    name = current.make_database()
    primary = current.server
    sender = Sender(sandbox.kafka.bootstrap_servers, topic)
    standby = Standby(primary)
    standby.start()
    current.server = standby
    urls = on_whichever_accepts_writes(name, primary, standby)
    environ = {**environ, **urls.environ()}
    try:
        # Nothing, the last batches, or everything since the consumer started for the first time.
        loss = rng.choices(["nothing", "the last", "everything"], [1, 7, 2])[0]
        if loss == "everything":
            detach(standby, primary)
        with consuming(environ) as consumer, serving(environ) as api:
            sender.send_orders(uids("order", 300))
            wait_until_handled(sender.manifest, urls)
            if loss == "the last":
                detach(standby, primary)
            sender.send_orders(rng.sample(uids("order", 300), 200), version=2)
            sender.send_bad(b"[")
            wait_until_handled(sender.manifest, urls)
            before = next_offsets(urls)
            # Without load, nothing but its own check tells the consumer that its offsets went back.
            with sending_meanwhile(sender, rng) if rng.random() < 0.7 else contextlib.nullcontext():
                time.sleep(rng.uniform(0, 0.3))
                fail(primary, rng)
                standby.execute("SELECT pg_promote()")
                assert loss == "nothing" or next_offsets(urls) != before
                time.sleep(rng.uniform(0, 0.3))
            wait_until_handled(sender.manifest, urls, WITHIN_S)
            wait_for(lambda: api.get("/readyz").status == 200, WITHIN_S)
            wait_for(lambda: consumer.ready, WITHIN_S)
            assert_all_accounted_for(sender.manifest, urls, environ)
            assert consumer.stop() == 0
    finally:
        primary.close()


def detach(standby: Standby, primary: PostgresServer) -> None:
    """Let the standby receive nothing more."""
    behind = "SELECT pg_current_wal_lsn() - replay_lsn FROM pg_stat_replication"
    with psycopg.connect(primary.superuser_url, autocommit=True) as connection:
        wait_for(lambda: connection.execute(behind).fetchall() == [(0,)], WITHIN_S)
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    standby.execute("SELECT pg_reload_conf()")
    wait_for(lambda: not standby.execute("SELECT FROM pg_stat_wal_receiver"), WITHIN_S)


def fail(primary: PostgresServer, rng: Random) -> None:
    """Let the primary crash, or freeze it, so that its clients notice nothing, until it is fenced off."""
    if rng.random() < 0.3:
        pids = [primary.pid, *(child.pid for child in psutil.Process(primary.pid).children())]
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(rng.uniform(0, 3))
    primary.stop("immediate")
