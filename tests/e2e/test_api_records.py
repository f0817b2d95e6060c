"""What the API says about a Kafka record, and how long it waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.types.json import Jsonb

import orderlib
from orderlib.testing import SAMPLE as SAMPLE_JSON
from tests.support.api_process import Service, serving, settings_for
from tests.support.databases import Database
from tests.support.waiting import wait_for

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
FAULT = {"path": "$.payment.amount", "expected": "an integer", "found": "text"}
PRIVATE = b"private value"


@pytest.fixture(scope="module")
def store(module_database: Database) -> Iterator[psycopg.Connection]:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save(SAMPLE)
    with psycopg.connect(module_database.superuser_url, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def api(module_database: Database, store: psycopg.Connection) -> Iterator[Service]:  # noqa: ARG001 - has the order
    with serving(settings_for(module_database.reader_url, ORDERS_API_TOKENS="test:token")) as service:
        yield service


@pytest.fixture
def topic(store: psycopg.Connection) -> Iterator[str]:
    """A topic whose consumer has handled the first five records of partition 0 and rejected record 3."""
    store.execute(
        "INSERT INTO consumer_offsets (consumer_group, topic_id, partition, topic, next_offset) "
        "VALUES ('group', 'id', 0, 'orders', 5)"
    )
    store.execute(
        "INSERT INTO rejects (topic_id, partition, record_offset, topic, record_time, value, code, faults) "
        "VALUES ('id', 0, 3, 'orders', now(), %s, 'invalid_order', %s)",
        [PRIVATE, Jsonb({"total": 120, "first": [FAULT]})],
    )
    yield "orders"
    store.execute("DELETE FROM rejects")
    store.execute("DELETE FROM consumer_offsets")


def handle(store: psycopg.Connection, next_offset: int) -> None:
    store.execute("UPDATE consumer_offsets SET next_offset = %s, updated_at = now()", [next_offset])


AUTHORIZED = {"Authorization": "Bearer token"}

#: The sessions of an API whose last query was for the state of a record.
WAITING_SESSIONS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'orderlib-api'
AND query LIKE '%consumer_offsets%' AND pid <> pg_backend_pid()
"""


def ask(api: Service, path: str, method: str = "GET") -> Callable[[], tuple[int, object, float]]:
    """Begin a request, and return a function that waits for the answer."""
    result: list[tuple[int, object, float]] = []

    def send() -> None:
        answer = api.get(path, AUTHORIZED, method=method)
        result.append((answer.status, answer.json, answer.seconds))

    thread = threading.Thread(target=send)
    thread.start()

    def wait() -> tuple[int, object, float]:
        thread.join(20)
        return result[0]

    return wait


@pytest.mark.parametrize(
    ("position", "state"),
    [
        ("orders/0/4", {"state": "handled", "code": None, "faults": [], "total_faults": 0}),
        ("orders/0/5", {"state": "waiting", "code": None, "faults": [], "total_faults": 0}),
        ("orders/1/0", {"state": "unknown", "code": None, "faults": [], "total_faults": 0}),
        ("other/0/0", {"state": "unknown", "code": None, "faults": [], "total_faults": 0}),
        ("orders/0/3", {"state": "rejected", "code": "invalid_order", "faults": [FAULT], "total_faults": 120}),
    ],
)
@pytest.mark.usefixtures("topic")
def test_the_state_of_a_record_shows_none_of_its_values(api: Service, position: str, state: dict[str, object]) -> None:
    answer = api.get(f"/records/{position}", AUTHORIZED)
    assert (answer.status, answer.json) == (200, state)
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["Content-Type"] == "application/json"
    assert PRIVATE not in answer.body
    head = api.get(f"/records/{position}", AUTHORIZED, method="HEAD")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(answer.body)))
    assert api.get(f"/records/{position}").status == 401


@pytest.mark.usefixtures("topic")
def test_a_redriven_record_is_handled_unless_it_was_rejected_again(api: Service, store: psycopg.Connection) -> None:
    for outcome, state in [("rejected", "rejected"), ("stored", "handled"), ("superseded", "handled")]:
        store.execute("UPDATE rejects SET redriven_at = now(), redrive_outcome = %s", [outcome])
        assert api.get("/records/orders/0/3", AUTHORIZED).json["state"] == state


@pytest.mark.usefixtures("topic")
def test_a_wait_ends_as_soon_as_the_record_is_handled(api: Service, store: psycopg.Connection) -> None:
    answers = [ask(api, "/records/orders/0/5?wait=5"), ask(api, "/records/orders/0/6?wait=5")]
    time.sleep(0.5)
    handle(store, 6)
    status, state, seconds = answers[0]()
    assert (status, state) == (200, {"state": "handled", "code": None, "faults": [], "total_faults": 0})
    assert 0.4 < seconds < 1.5
    status, state, seconds = answers[1]()
    assert (status, state) == (200, {"state": "waiting", "code": None, "faults": [], "total_faults": 0})
    assert 5 <= seconds < 6


@pytest.mark.usefixtures("topic")
def test_a_wait_for_a_partition_that_a_consumer_begins_to_read_meanwhile(
    api: Service, store: psycopg.Connection
) -> None:
    answer = ask(api, "/records/orders/7/0?wait=4.5")
    time.sleep(0.3)
    store.execute(
        "INSERT INTO consumer_offsets (consumer_group, topic_id, partition, topic, next_offset) "
        "VALUES ('group', 'id', 7, 'orders', 1)"
    )
    _, state, seconds = answer()
    assert state == {"state": "handled", "code": None, "faults": [], "total_faults": 0}
    assert seconds < 1.5


@contextmanager
def waiting(api: Service, number: int) -> Iterator[list[Callable[[], tuple[int, object, float]]]]:
    """Clients that wait for records which are not handled meanwhile."""
    answers = [ask(api, f"/records/orders/0/{100 + client}?wait=5") for client in range(number)]
    time.sleep(0.3)
    yield answers
    for answer in answers:
        assert answer()[0] in {200, 503}


@pytest.mark.usefixtures("topic")
def test_fifty_waiting_clients_delay_no_other_client(api: Service, store: psycopg.Connection) -> None:
    with waiting(api, 50) as answers:
        with ThreadPoolExecutor(4) as pool:
            orders = list(pool.map(lambda _: api.get(f"/orders/{SAMPLE.order_uid}", AUTHORIZED), range(200)))
        assert {answer.status for answer in orders} == {200}
        assert sorted(answer.seconds for answer in orders)[190] < 0.25
        [sessions] = store.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'orderlib-api'"
        ).fetchall()
        assert sessions[0] <= 10
        handle(store, 1000)
        for answer in answers:
            status, state, seconds = answer()
            assert (status, state) == (200, {"state": "handled", "code": None, "faults": [], "total_faults": 0})
            assert seconds < 4.5


@pytest.mark.usefixtures("topic")
def test_clients_that_wait_behind_a_lock_on_rejects_block_no_order(
    api: Service, store: psycopg.Connection, module_database: Database
) -> None:
    with waiting(api, 30):
        with psycopg.connect(module_database.superuser_url) as locker:
            locker.execute("LOCK TABLE rejects IN ACCESS EXCLUSIVE MODE")
            time.sleep(0.5)
            for _ in range(20):
                answer = api.get(f"/orders/{SAMPLE.order_uid}", AUTHORIZED)
                assert (answer.status, answer.seconds < 0.5) == (200, True)
            locker.rollback()
        wait_for(lambda: api.get("/records/orders/0/3", AUTHORIZED).json["state"] == "rejected", 10)
    assert store.closed is False


@pytest.mark.usefixtures("topic")
def test_a_stop_answers_the_clients_that_wait(module_database: Database, store: psycopg.Connection) -> None:
    others = store.execute(WAITING_SESSIONS).fetchone()
    with serving(settings_for(module_database.reader_url, ORDERS_API_TOKENS="test:token")) as service:
        answer = ask(service, "/records/orders/0/100?wait=5")
        wait_for(lambda: store.execute(WAITING_SESSIONS).fetchone() != others)
        assert service.stop() == 0
        assert answer()[0] == 200
