"""``python -m services.consumer``: store each order from Kafka exactly once."""

from __future__ import annotations

if __name__ == "__main__":
    from services import end_at_early_sigterm

    end_at_early_sigterm()

import argparse
import concurrent.futures
import functools
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from orderlib.entry_point import EXIT_DONE, EXIT_STATUSES, StopEvent
from orderlib.errors import TransientError
from orderlib.ingestion.consumer_core import Breaker, ConsumerCore
from orderlib.ingestion.records import TopicPartition, classify_record
from orderlib.ingestion.retry import Backoff
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.rows import pack_rows
from services.consumer.health import Health, HealthServer
from services.consumer.kafka_consumer import KafkaConsumer
from services.consumer.metrics import ConsumerMetrics
from services.consumer.runner import STOP_CLOSE_S, ConsumerRunner, StoreWorker
from services.kafka import TopicInfo
from services.program import event, run_with_kafka, set_up_program
from services.settings import ConsumerSettings

T = TypeVar("T")

#: While the consumer waits for a server at the start, it checks for signals this often.
_POLL_S = 0.1


class _StopRequested(Exception):
    """A signal arrived while the consumer waited for a server at the start."""


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run the consumer. Return 0 after a signal or at the end, 1 after an error, 2 for a configuration error."""
    parser = argparse.ArgumentParser(
        prog="python -m services.consumer",
        description="Store each order of the topic in PostgreSQL exactly once. SIGTERM and Ctrl-C stop it cleanly.",
        epilog="Settings are environment variables: ORDERS_DATABASE_URL, ORDERS_KAFKA_BOOTSTRAP_SERVERS, ORDERS_TOPIC, "
        "ORDERS_CONSUMER_GROUP, ORDERS_MAX_RECORD_BYTES, ORDERS_TOMBSTONES, ORDERS_METRICS_BIND, "
        "ORDERS_BREAKER_FRACTION, and ORDERS_KAFKA_X_Y for librdkafka's property x.y. "
        f"{EXIT_STATUSES}",
    )
    parser.add_argument(
        "--exit-at-end",
        action="store_true",
        help="stop with exit status 0 when all records that Kafka had at the start are handled",
    )
    options = parser.parse_args(arguments)
    settings = ConsumerSettings.from_mapping(environ)
    stop_event = StopEvent()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop_event.set())

    clock = time.monotonic
    health, metrics = Health(clock), ConsumerMetrics()
    store = ConsumerStore(settings.database_url, settings.group, clock)
    with HealthServer(settings.metrics_bind, health, metrics) as server:
        event("started", metrics=str(server.address), topic=settings.kafka.topic, group=settings.group)
        kafka = KafkaConsumer(settings)
        try:
            topics = _wait_for(kafka.describe, "Kafka", stop_event, health)
            until = None
            if options.exit_at_end:
                until = _wait_for(lambda: _ends(kafka, topics), "Kafka", stop_event, health)
            _wait_for(store.claim_database, "PostgreSQL", stop_event, health)
            if store.is_superuser:
                event("connected_as_superuser", logging.WARNING, variable="ORDERS_DATABASE_URL")
        except _StopRequested:
            return EXIT_DONE
        core = ConsumerCore(
            functools.partial(
                classify_record,
                max_bytes=settings.max_record_bytes,
                pack_rows=pack_rows,
                tombstones=settings.tombstones,
            ),
            random.Random(),  # noqa: S311  jitter, no secret
            until=until,
        )
        worker = StoreWorker(store, kafka, Breaker(settings.breaker_fraction), metrics)
        kafka.join(core)
        try:
            runner = ConsumerRunner(
                core, kafka, worker, health, metrics, clock, stop_event, exit_at_end=options.exit_at_end
            )
            return runner.run()
        finally:
            worker.close(timeout_s=1)
            left_group = kafka.close(STOP_CLOSE_S)
            event("exited", left_group=left_group)


def _ends(kafka: KafkaConsumer, topics: Mapping[str, TopicInfo]) -> Mapping[TopicPartition, int]:
    """Return the log end of each partition of the topics."""
    return kafka.ends(TopicPartition(topic, number) for topic, info in topics.items() for number in info.partitions)


def _wait_for(request: Callable[[], T], server: str, stop_event: StopEvent, health: Health) -> T:
    """Send a request to a server until it succeeds, and return the result. Log once that the server is unavailable.

    Raise ConfigurationError at once, and _StopRequested if a signal arrives.
    """
    backoff = Backoff(rng=random.Random())  # noqa: S311  jitter, no secret
    logged = False
    future = _start(request)
    while not stop_event.is_set():
        health.heartbeat()
        concurrent.futures.wait([future], _POLL_S)
        if not future.done():
            continue
        try:
            return future.result()
        except TransientError as exc:
            health.not_ready_reason = str(exc)
            if not logged:
                event("waiting_for_server", logging.WARNING, server=server, reason=str(exc))
                logged = True
        stop_event.wait(backoff.next_wait_s())
        future = _start(request)
    raise _StopRequested


def _start(request: Callable[[], T]) -> concurrent.futures.Future[T]:
    """Send a request in a daemon thread, because nothing can interrupt it. A stop must not wait for its end."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(request())
        except BaseException as exc:  # noqa: BLE001  the caller of result() gets it
            future.set_exception(exc)

    threading.Thread(target=work, daemon=True).start()
    return future


def _tune_interpreter() -> None:
    """Tune the interpreter for two busy threads, and for batches of objects without reference cycles.

    The store thread requests the interpreter lock after each write to its socket. With the default of 5 ms the database
    would wait for the consumer. The garbage collector would examine each batch several times and find no cycles, so it
    runs rarely.
    """
    sys.setswitchinterval(0.00005)
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


if __name__ == "__main__":
    set_up_program(os.environ)
    _tune_interpreter()
    run_with_kafka(lambda: main(sys.argv[1:], os.environ))
