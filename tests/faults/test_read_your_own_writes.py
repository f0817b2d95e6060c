"""Many clients send, wait and read, while the consumer is killed again and again and PostgreSQL crashes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import attrs
import psycopg
import pytest
from confluent_kafka import KafkaError, Message, Producer

import orderlib
from orderlib import DatabaseUnavailable, Order, RecordState
from services.kafka import SILENT_LOGGER, not_none
from tests.support.api_process import Service, serving
from tests.support.consumer_process import consuming
from tests.support.databases import Database
from tests.support.sending import order

#: The longest that a record may take to be handled, with all kills.
_HANDLED_WITHIN_S = 60.0
#: Each client sends an invalid record after this number of records.
_BAD_EVERY = 7


class AsyncProducer:
    """Publishes records, and returns the position of each once Kafka has acknowledged it."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self._topic = topic
        self._producer = Producer(
            {"bootstrap.servers": bootstrap_servers, "enable.idempotence": True, "linger.ms": 1}, logger=SILENT_LOGGER
        )

    async def send(self, key: str, value: bytes) -> tuple[str, int, int]:
        loop = asyncio.get_running_loop()
        acknowledged: asyncio.Future[tuple[str, int, int]] = loop.create_future()

        def on_delivery(error: KafkaError | None, message: Message) -> None:
            assert error is None, error
            acknowledged.set_result((self._topic, not_none(message.partition()), not_none(message.offset())))

        self._producer.produce(self._topic, value, key.encode(), on_delivery=on_delivery)
        return await acknowledged

    async def poll(self) -> None:
        while True:
            self._producer.poll(0)
            await asyncio.sleep(0.002)


@attrs.frozen
class Library:
    """Waits and reads with the library."""

    repository: orderlib.AsyncOrderRepository

    async def wait(self, position: tuple[str, int, int]) -> tuple[str, str | None, list[str]]:
        state = await self.repository.wait_until_handled(*position, timeout_s=_HANDLED_WITHIN_S)
        return state.state, state.code, [fault.path for fault in state.faults]

    async def get(self, order_uid: str) -> Order:
        while True:
            try:
                return await self.repository.get(order_uid)
            except DatabaseUnavailable:
                await asyncio.sleep(0.05)


@attrs.frozen
class Http:
    """Waits and reads over HTTP."""

    api: Service

    async def wait(self, position: tuple[str, int, int]) -> tuple[str, str | None, list[str]]:
        topic, partition, offset = position
        deadline_s = time.monotonic() + _HANDLED_WITHIN_S
        while True:
            answer = await asyncio.to_thread(self.api.get, f"/records/{topic}/{partition}/{offset}?wait=5")
            if answer.status == 200:
                state = answer.json
                if state["state"] in {"handled", "rejected"} or time.monotonic() > deadline_s:
                    return state["state"], state["code"], [fault["path"] for fault in state["faults"]]
            else:
                assert answer.status == 503
                await asyncio.sleep(0.05)

    async def get(self, order_uid: str) -> Order:
        while True:
            answer = await asyncio.to_thread(self.api.get, f"/orders/{order_uid}")
            if answer.status != 503:
                assert answer.status == 200
                return orderlib.decode_order(answer.body)
            await asyncio.sleep(0.05)


@attrs.define
class Run:
    """Counts, and what is killed at which count."""

    sends: int
    kills: int
    handled: int = 0
    killed: int = 0
    crashed: bool = False
    failure: BaseException | None = None


async def client(name: str, sends: int, producer: AsyncProducer, reader: Library | Http, run: Run) -> None:
    """Send versions of one order, each after the one before has been read back."""
    stored = None
    for number in range(1, sends + 1):
        is_bad = number % _BAD_EVERY == 0
        value = order(name, number)
        if is_bad:
            content: dict[str, Any] = json.loads(value)
            content["payment"]["amount"] = "1"
            content["items"][0]["price"] = -1
            value = json.dumps(content).encode()
        position = await producer.send(name, value)
        state = await reader.wait(position)
        if is_bad:
            expected = (RecordState.REJECTED, "invalid_order", ["$.payment.amount", "$.items[0].price"])
            assert state == expected, position
        else:
            assert state == (RecordState.HANDLED, None, []), position
            stored = orderlib.decode_order(value)
        found = await reader.get(name)
        assert found == stored, f"{name}: expected version {number}, found {found.track_number}"
        run.handled += 1
        if run.failure is not None:
            raise run.failure


@contextmanager
def killed_consumers(environ: dict[str, str], run: Run) -> Iterator[None]:
    """Run a consumer, kill it at each part of the sends, and start its successor."""
    stop = threading.Event()

    def consume() -> None:
        try:
            while not stop.is_set():
                with consuming(environ) as consumer:
                    next_kill = (run.killed + 1) * run.sends // (run.kills + 1)
                    while not stop.is_set() and not (run.killed < run.kills and run.handled >= next_kill):
                        assert consumer.process.poll() is None, "the consumer stopped by itself"
                        time.sleep(0.005)
                    if not stop.is_set():
                        consumer.kill()
                        run.killed += 1
        except BaseException as exc:
            run.failure = exc
            raise

    thread = threading.Thread(target=consume)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def crash_postgres(database: Database, run: Run) -> None:
    """Kill a session of the consumer with SIGKILL at half of the sends: PostgreSQL ends all sessions and recovers."""
    while run.handled < run.sends // 2:
        await asyncio.sleep(0.005)
    while not run.crashed:
        with psycopg.connect(database.superuser_url, autocommit=True) as connection:
            for (pid,) in connection.execute(
                "SELECT pid FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'orderlib-consumer'"
            ).fetchall():
                # It may have ended since, or with the one killed before it.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    run.crashed = True
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    ("sends", "clients", "kills"),
    [
        pytest.param(200, 20, 1, id="200"),
        pytest.param(10_000, 100, 6, id="10000", marks=pytest.mark.faults),
    ],
)
def test_what_was_sent_is_read_after_the_wait(
    sends: int, clients: int, kills: int, member: dict[str, str], database: Database
) -> None:
    run = Run(sends, kills)

    async def all_clients(api: Service) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(clients))
        producer = AsyncProducer(member["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], member["ORDERS_TOPIC"])
        polling = asyncio.create_task(producer.poll())
        async with orderlib.connect_async(database.reader_url) as repository, asyncio.TaskGroup() as tasks:
            tasks.create_task(crash_postgres(database, run))
            readers: list[Library | Http] = [Library(repository), Library(repository), Library(repository), Http(api)]
            for number in range(clients):
                reader = readers[number % len(readers)]
                tasks.create_task(client(f"order-{number}", sends // clients, producer, reader, run))
        polling.cancel()

    with serving(member) as api, killed_consumers(member, run):
        asyncio.run(all_clients(api))
    assert (run.handled, run.killed, run.crashed) == (sends, kills, True)
