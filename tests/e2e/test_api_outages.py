"""The database refuses, is cut off, freezes, is locked or restarts: the API answers in time and recovers."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import orderlib
from orderlib.testing import SAMPLE as SAMPLE_JSON
from tests.support.api_process import Answer, Service, serving, settings_for
from tests.support.databases import Database
from tests.support.tcp_proxy import TcpProxy
from tests.support.waiting import wait_for

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
PATH = f"/orders/{SAMPLE.order_uid}"

#: The promised time limits, and the time that a busy machine may add.
REFUSED_WITHIN_S = 2.0
FROZEN_WITHIN_S = 5.0


@pytest.fixture(scope="module")
def stored(module_database: Database) -> Database:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save(SAMPLE)
    return module_database


@pytest.fixture(scope="module")
def wire(stored: Database) -> Iterator[TcpProxy]:
    with TcpProxy(stored.reader_url) as made:
        yield made


@pytest.fixture(scope="module")
def api(wire: TcpProxy) -> Iterator[Service]:
    with serving(settings_for(wire.url)) as service:
        yield service


BACKENDS = """
SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'orderlib-api'
"""


def ask_at_once(api: Service, number: int) -> list[Answer]:
    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(lambda _: api.get(PATH), range(number)))


def assert_unavailable(answers: list[Answer], within_s: float) -> None:
    assert {answer.status for answer in answers} == {503}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers)
    assert all(answer.headers["Content-Type"] == "application/problem+json" for answer in answers)
    assert max(answer.seconds for answer in answers) < within_s


def threads(api: Service) -> int:
    [worker] = api.workers()
    return len(list(Path(f"/proc/{worker}/task").iterdir()))


def test_a_database_that_refuses_connections_means_503_within_two_seconds(api: Service, wire: TcpProxy) -> None:
    assert api.get(PATH).status == 200
    wire.cut()
    try:
        assert_unavailable(ask_at_once(api, 30), REFUSED_WITHIN_S)
        assert api.get("/readyz").status == 503
        assert api.get("/livez").status == 200
        page = api.page("/")
        assert page.status == 503
        assert "is unavailable" in page.text
    finally:
        wire.mend()
    assert api.get(PATH).status == 200
    assert api.get("/readyz").status == 200


def test_a_silent_first_host_fails_no_request(stored: Database) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        port = conninfo_to_dict(stored.reader_url)["port"]
        ports = f"{silent.getsockname()[1]},{port}"
        url = make_conninfo(stored.reader_url, host="127.0.0.1,127.0.0.1", port=ports)
        with serving(settings_for(url)) as service:
            assert {answer.status for answer in ask_at_once(service, 16)} == {200}
            assert service.get("/readyz").status == 200


def test_lost_idle_connections_fail_no_request(api: Service, wire: TcpProxy) -> None:
    assert {answer.status for answer in ask_at_once(api, 16)} == {200}
    wire.cut()
    wire.mend()
    assert {answer.status for answer in ask_at_once(api, 16)} == {200}


def test_a_frozen_database_means_503_within_five_seconds_and_blocks_nothing_else(api: Service, wire: TcpProxy) -> None:
    assert {answer.status for answer in ask_at_once(api, 16)} == {200}
    before = threads(api)
    wire.freeze()
    try:
        with ThreadPoolExecutor(1) as aside:
            asked = aside.submit(ask_at_once, api, 60)
            # Meanwhile requests that need no database are answered as usual.
            assert max(api.get("/livez").seconds for _ in range(20)) < 1
            assert_unavailable(asked.result(), FROZEN_WITHIN_S)
        assert api.get("/readyz").status == 503
        assert threads(api) <= before + 2
    finally:
        wire.thaw()
    wait_for(lambda: api.get(PATH).status == 200, 20)


def test_reads_behind_a_lock_get_503_and_do_not_fill_the_database_with_connections(
    api: Service, stored: Database
) -> None:
    with psycopg.connect(stored.superuser_url) as locker:
        locker.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
        answers = ask_at_once(api, 40)
        assert_unavailable(answers, FROZEN_WITHIN_S)

        def waiting() -> int:
            with psycopg.connect(stored.superuser_url, autocommit=True) as other:
                row = other.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
                assert row is not None
                return int(row[0])

        wait_for(lambda: waiting() == 0, 20)
        locker.rollback()
    wait_for(lambda: api.get(PATH).status == 200, 20)


def test_stopped_backends_are_abandoned_and_replaced(api: Service, stored: Database) -> None:
    assert api.get(PATH).status == 200
    with psycopg.connect(stored.superuser_url, autocommit=True) as superuser:
        backends = [pid for (pid,) in superuser.execute(BACKENDS)]
    for pid in backends:
        os.kill(pid, signal.SIGSTOP)
    try:
        answers = ask_at_once(api, 16)
        assert max(answer.seconds for answer in answers) < FROZEN_WITHIN_S
        assert {answer.status for answer in answers} <= {200, 503}
        assert {answer.status for answer in ask_at_once(api, 16)} == {200}
    finally:
        for pid in backends:
            os.kill(pid, signal.SIGCONT)


def test_an_order_a_304_and_a_page_execute_few_statements(api: Service, wire: TcpProxy, stored: Database) -> None:
    """Counts include BEGIN and COMMIT."""
    with orderlib.connect(stored.writer_url) as repository:
        repository.save_many(attrs.evolve(SAMPLE, order_uid=f"cost-{n}") for n in range(30))

    def cost(path: str, **headers: str) -> int:
        # Now all statements are prepared and one connection is idle.
        api.get(path, headers)
        before = wire.executed
        assert api.get(path, headers).status in (200, 304)
        return wire.executed - before

    assert cost(PATH) == 4
    assert cost(PATH, **{"If-None-Match": f'"{orderlib.content_sha256(SAMPLE).hex()}"'}) == 1
    assert cost("/orders?limit=1") == cost("/orders?limit=30") == 4


def test_an_api_that_starts_before_its_database_waits_for_it(stored: Database) -> None:
    with TcpProxy(stored.reader_url) as wire:
        wire.cut()
        with serving(settings_for(wire.url)) as early:
            assert len(early.events("waiting_for_server")) == 1
            assert early.get("/livez").status == 200
            assert_unavailable([early.get(PATH)], REFUSED_WITHIN_S)
            wire.mend()
            assert early.get(PATH).status == 200


def test_no_client_sees_a_mixture_of_two_versions(api: Service, stored: Database) -> None:
    def version(letter: str, items: int) -> orderlib.Order:
        item = attrs.evolve(SAMPLE.items[0], name=letter)
        return attrs.evolve(
            SAMPLE,
            order_uid="rewritten",
            entry=letter,
            delivery=attrs.evolve(SAMPLE.delivery, name=letter),
            payment=attrs.evolve(SAMPLE.payment, bank=letter),
            items=[item] * items,
        )

    versions = [version("A", 2), version("B", 5)]
    whole = {orderlib.encode_order(order) for order in versions}
    done = threading.Event()

    def rewrite() -> None:
        with orderlib.connect(stored.writer_url) as repository:
            while not done.is_set():
                for order in versions:
                    repository.save(order)

    with orderlib.connect(stored.writer_url) as repository:
        repository.save(versions[0])
    with ThreadPoolExecutor(1) as pool:
        rewriting = pool.submit(rewrite)
        try:
            seen = {api.get("/orders/rewritten").body for _ in range(150)}
            listed = {api.get("/orders?customer_id=test&limit=1").status for _ in range(20)}
        finally:
            done.set()
        rewriting.result()
    assert seen == whole
    assert listed == {200}
