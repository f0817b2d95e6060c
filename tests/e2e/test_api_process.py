"""The API as a program: how it starts, how it stops, and who cannot hold it up."""

from __future__ import annotations

import errno
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import attrs
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

import orderlib
from orderlib.postgres.connection import connect
from orderlib.postgres.migrate import bootstrap
from orderlib.testing import SAMPLE as SAMPLE_JSON
from tests.cable import cable
from tests.conftest import Database, role_passwords
from tests.serving import HALF_A_REQUEST, ROOT, Service, clients, eventually, serving, settings_for

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
PATH = f"/orders/{SAMPLE.order_uid}"


@pytest.fixture(scope="module")
def stored(module_database: Database) -> Database:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save(SAMPLE)
        repository.save_many(attrs.evolve(SAMPLE, order_uid=f"n-{n}", items=SAMPLE.items * 10) for n in range(100))
    return module_database


@pytest.fixture(scope="module")
def api(stored: Database) -> Iterator[Service]:
    with serving(settings_for(stored.reader_url)) as service:
        yield service


@pytest.fixture
def mortal(stored: Database) -> Iterator[Service]:
    """One for the test alone, to end as it likes."""
    with serving(settings_for(stored.reader_url)) as service:
        yield service


def refused(environ: dict[str, str]) -> str:
    """The one line that it says when it will not start."""
    ended = subprocess.run(
        [sys.executable, "-m", "services.api"],
        env=environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    [line] = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    return line


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ORDERS_READER_URL": ""}, "ORDERS_READER_URL"),
        ({"ORDERS_READER_URL": "nonsense://secret"}, "database URL"),
        ({"ORDERS_API_AUTH": ""}, "ORDERS_API_TOKENS"),
        ({"ORDERS_API_AUTH": "maybe"}, "ORDERS_API_AUTH"),
        ({"ORDERS_API_TOKENS": "a:b"}, "contradict"),
        ({"ORDERS_API_AUTH": "", "ORDERS_API_TOKENS": "no-name-secret"}, "ORDERS_API_TOKENS"),
        ({"ORDERS_API_BIND": "nowhere"}, "ORDERS_API_BIND"),
        ({"ORDERS_METRICS_BIND": "127.0.0.1:99999"}, "ORDERS_METRICS_BIND"),
        ({"WEB_CONCURRENCY": "several"}, "WEB_CONCURRENCY"),
    ],
)
def test_wrong_settings_are_named_in_one_line(stored: Database, changed: dict[str, str], named: str) -> None:
    line = refused({**settings_for(stored.reader_url), **changed})
    assert named in line
    assert "secret" not in line


def test_a_database_that_is_not_fit_is_named_in_one_line(stored: Database, empty_database: Database) -> None:
    with connect(empty_database.superuser_url, application_name="tests") as superuser:
        bootstrap(superuser, role_passwords(empty_database))
    assert "services.admin migrate" in refused(settings_for(empty_database.reader_url))
    wrong_password = refused(settings_for(make_conninfo(stored.reader_url, password="wrong")))
    assert "password authentication failed" in wrong_password
    assert "does not exist" in refused(settings_for(make_conninfo(stored.reader_url, dbname="nowhere")))


def test_an_address_in_use_is_named_in_one_line(stored: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = refused(settings_for(stored.reader_url, ORDERS_API_BIND=address))
    assert line == f"error: ORDERS_API_BIND: cannot listen on {address}: {os.strerror(errno.EADDRINUSE)}"


def test_without_tokens_it_warns(api: Service) -> None:
    [warning] = api.events("no_authentication")
    assert warning["level"] == "warning"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_clean(mortal: Service, number: signal.Signals) -> None:
    assert mortal.get(PATH).status == 200
    workers = mortal.workers()
    begin = time.monotonic()
    assert mortal.stop(number) == 0
    assert time.monotonic() - begin < 5
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
    with pytest.raises(ConnectionRefusedError):
        mortal.get("/livez")


def test_a_stop_finishes_what_it_began_and_waits_for_nobody_else(stored: Database) -> None:
    with cable(stored.reader_url) as wire, serving(settings_for(wire.url)) as api, ThreadPoolExecutor(1) as pool:
        assert api.get(PATH).status == 200
        with clients(api, 5, HALF_A_REQUEST), clients(api, 5, b""):
            wire.freeze()
            asked = pool.submit(api.get, PATH)
            assert eventually(lambda: api.connections() == 11, 5)
            api.process.terminate()
            assert eventually(lambda: not api.accepts(), 5)
            wire.thaw()
            assert asked.result().body == orderlib.encode_order(SAMPLE)
            assert api.process.wait(5) == 0


@pytest.mark.parametrize("sent", [b"", HALF_A_REQUEST, b"G"])
def test_two_hundred_idle_or_half_sent_connections_delay_nobody(api: Service, sent: bytes) -> None:
    with clients(api, 200, sent):
        assert eventually(lambda: api.connections() == 200, 5)
        assert max(api.get(PATH).seconds for _ in range(30)) < 1


def test_clients_that_do_not_take_their_answers_delay_nobody(api: Service) -> None:
    request = b"GET /orders?limit=100 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    before = len(api.events("request"))
    with clients(api, 50, request):
        assert eventually(lambda: len(api.events("request")) == before + 50, 15)
        assert max(api.get(PATH).seconds for _ in range(30)) < 1


def test_more_clients_than_it_can_bear_leave_it_working(api: Service) -> None:
    with clients(api, 950, b""):
        # It does not run out of file handles: some were closed at once.
        assert eventually(lambda: api.connections() <= 900, 5)
    assert eventually(lambda: api.connections() == 0, 5)
    assert api.get(PATH).status == 200


def test_early_closes_leave_nothing_behind(api: Service, stored: Database) -> None:
    for _ in range(5):
        with clients(api, 40, f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()):
            pass
    assert eventually(lambda: api.connections() == 0, 5)
    assert api.get(PATH).body == orderlib.encode_order(SAMPLE)
    assert api.events("request_failed") == []
    with psycopg.connect(stored.superuser_url, autocommit=True) as superuser:

        def sessions(state: str) -> int:
            row = superuser.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND application_name = 'orderlib-api' AND state LIKE %s",
                [state],
            ).fetchone()
            assert row is not None
            return int(row[0])

        assert eventually(lambda: sessions("%") <= 8, 5)
        assert sessions("%transaction%") == 0


def test_a_killed_worker_is_replaced_and_nobody_gets_a_wrong_answer(mortal: Service) -> None:
    assert mortal.get(PATH).status == 200
    [worker] = mortal.workers()
    expected = orderlib.encode_order(SAMPLE)
    stop = threading.Event()
    refusals = (ConnectionError, http.client.HTTPException, TimeoutError)

    def ask() -> int:
        answered = 0
        while not stop.is_set():
            with suppress(*refusals):
                answer = mortal.get(PATH)
                assert (answer.status, answer.body) == (200, expected)
                answered += 1
        return answered

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            assert eventually(lambda: len(mortal.events("request")) > 20, 5)
            os.kill(worker, signal.SIGKILL)
            assert eventually(lambda: mortal.workers() not in ([], [worker]), 5)
            before = len(mortal.events("request"))
            assert eventually(lambda: len(mortal.events("request")) > before + 50, 10)
        finally:
            stop.set()
        assert all(one.result() > 0 for one in asking)
    text = mortal.get("/metrics", address=mortal.metrics_address).text
    # What the killed one counted is not lost.
    assert sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if "requests_total{" in line) >= before


def test_a_reload_changes_the_workers_and_refuses_nobody(mortal: Service) -> None:
    assert mortal.get(PATH).status == 200
    before = mortal.workers()
    mortal.process.send_signal(signal.SIGHUP)
    statuses: set[int] = set()

    def is_reloaded() -> bool:
        statuses.add(mortal.get(PATH).status)
        return bool(mortal.workers()) and not set(mortal.workers()) & set(before)

    assert eventually(is_reloaded, 10)
    assert statuses == {200}


def test_several_workers_serve_and_count_together(stored: Database) -> None:
    with serving(settings_for(stored.reader_url, WEB_CONCURRENCY="2")) as api:
        assert eventually(lambda: len(api.workers()) == 2, 5)
        for _ in range(40):
            assert api.get(PATH).status == 200
        text = api.get("/metrics", address=api.metrics_address).text
        assert 'orders_http_requests_total{method="GET",route="/orders/{order_uid}",status="200"} 40.0' in text
