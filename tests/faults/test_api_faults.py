"""The API while PostgreSQL restarts under load, and with clients that are slow for a long time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import attrs
import psycopg
import pytest

import orderlib
from orderlib.testing import SAMPLE as SAMPLE_JSON
from sandbox import PostgresServer
from services.api.asgi import API_CONNECTIONS, HEALTH_CONNECTIONS
from tests.support.api_process import HALF_A_REQUEST, clients, serving, settings_for
from tests.support.databases import Database, on_server, set_up
from tests.support.waiting import wait_for

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
PATH = f"/orders/{SAMPLE.order_uid}"
MODES: tuple[Literal["fast", "immediate"], ...] = ("fast", "immediate")


@pytest.mark.faults
def test_after_a_restart_under_load_the_api_recovers_and_no_response_was_wrong() -> None:
    server = PostgresServer()
    server.start()
    expected = orderlib.encode_order(SAMPLE)
    done = threading.Event()
    try:
        with serving(settings_for(_prepared(server))) as api, ThreadPoolExecutor(8) as pool:

            def ask() -> set[int]:
                statuses = set()
                while not done.is_set():
                    answer = api.get(PATH)
                    statuses.add(answer.status)
                    assert answer.status != 200 or answer.body == expected
                    assert answer.seconds < 5
                return statuses

            def answered(status: int) -> int:
                return sum(event["status"] == status for event in api.events("request"))

            def wait_for_more(status: int) -> None:
                before = answered(status)
                wait_for(lambda: answered(status) > before + 20, 20)

            asking = [pool.submit(ask) for _ in range(8)]
            try:
                for mode in MODES:
                    server.stop(mode)
                    wait_for_more(503)
                    server.start()
                    wait_for_more(200)
            finally:
                done.set()
            assert set.union(*(one.result() for one in asking)) == {200, 503}
            with psycopg.connect(server.superuser_url) as superuser:
                sessions = superuser.execute("SELECT FROM pg_stat_activity WHERE application_name = 'orderlib-api'")
                assert sessions.rowcount <= API_CONNECTIONS + HEALTH_CONNECTIONS
            assert api.events("request_failed") == []
    finally:
        server.close()


def _prepared(server: PostgresServer) -> str:
    database = on_server(server)
    set_up(database)
    with orderlib.connect(database.writer_url) as repository:
        repository.save(SAMPLE)
    return database.reader_url


@pytest.mark.faults
def test_a_client_that_does_not_send_its_request_in_time_is_disconnected(module_database: Database) -> None:
    with (
        serving(settings_for(module_database.reader_url)) as api,
        clients(api, 20, HALF_A_REQUEST),
        clients(api, 20, b""),
    ):
        wait_for(lambda: api.connections() == 40, 20)
        wait_for(lambda: api.connections() == 0, 12)


@pytest.mark.faults
def test_a_client_that_does_not_read_its_responses_is_disconnected(module_database: Database) -> None:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save_many(attrs.evolve(SAMPLE, order_uid=f"n-{n}", items=SAMPLE.items * 20) for n in range(100))
    request = b"GET /orders?limit=100 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(settings_for(module_database.reader_url)) as api, clients(api, 3, request * 50):
        wait_for(lambda: len(api.events("request")) >= 3, 10)
        assert api.connections() == 3
        wait_for(lambda: api.connections() == 0, 60)
        # They were closed for not taking them: not all were even made.
        assert len(api.events("request")) < 150
