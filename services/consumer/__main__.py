"""``python -m services.consumer``: stores every order from Kafka exactly once, and loses none."""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from orderlib.errors import TransientError
from orderlib.ingestion.consumer_core import Breaker, ConsumerCore
from orderlib.ingestion.records import classify_record
from orderlib.ingestion.retry import Backoff
from orderlib.postgres.consumer_store import ConsumerStore
from orderlib.postgres.rows import pack_rows
from services.consumer.health import Health, HealthServer, Metrics
from services.consumer.kafka_consumer import KafkaConsumer
from services.consumer.runner import STOP_CLOSE_S, ConsumerRunner, StoreWorker
from services.program import EXIT_DONE, event, run, set_up_logging
from services.settings import ConsumerSettings

T = TypeVar("T")

#: How soon a signal is heeded while we wait for an answer.
_TURN_S = 0.1


class _Told(Exception):
    """A signal came while we waited for a server at the start."""


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """The exit status: 0 told to stop or the end reached, 1 stopped itself, 2 set-up."""
    parser = argparse.ArgumentParser(
        prog="python -m services.consumer",
        description="Store every order of the topic in PostgreSQL, exactly once. Stops cleanly on SIGTERM and Ctrl-C.",
        epilog="Settings are environment variables: ORDERS_DATABASE_URL, ORDERS_KAFKA_BOOTSTRAP_SERVERS, ORDERS_TOPIC, "
        "ORDERS_CONSUMER_GROUP, ORDERS_MAX_RECORD_BYTES, ORDERS_METRICS_BIND, ORDERS_BREAKER_FRACTION.",
    )
    parser.add_argument(
        "--exit-at-end", action="store_true", help="stop with 0 when the log ends seen at the start are handled"
    )
    options = parser.parse_args(arguments)
    settings = ConsumerSettings.from_mapping(environ)
    stop_event = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop_event.set())

    clock = time.monotonic
    health, metrics = Health(clock), Metrics()
    store = ConsumerStore(settings.database_url, settings.group, clock)
    with HealthServer(settings.metrics_bind, health, metrics) as server:
        event("started", metrics=str(server.address), topic=settings.kafka.topic, group=settings.group)
        topic = KafkaConsumer(settings)
        try:
            info = _once_it_answers(topic.describe, "Kafka", stop_event, health)
            ends = _once_it_answers(lambda: topic.ends(info.partitions), "Kafka", stop_event, health)
            _once_it_answers(store.check, "PostgreSQL", stop_event, health)
        except _Told:
            return EXIT_DONE
        core = ConsumerCore(
            settings.kafka.topic,
            functools.partial(classify_record, max_bytes=settings.max_record_bytes, pack_rows=pack_rows),
            random.Random(),  # noqa: S311  jitter, no secret
            until=ends if options.exit_at_end else None,
        )
        worker = StoreWorker(store, topic, Breaker(settings.breaker_fraction), metrics)
        topic.join(core)
        try:
            loop = ConsumerRunner(
                core, topic, worker, health, metrics, clock, stop_event, exit_at_end=options.exit_at_end
            )
            return loop.run()
        finally:
            worker.close(timeout_s=1)
            left = topic.close(STOP_CLOSE_S)
            event("ended", left_group=left)


def _once_it_answers(ask: Callable[[], T], server: str, stop_event: threading.Event, health: Health) -> T:
    """Ask until there is an answer; say once that we wait. Raises ConfigurationError at once."""
    backoff = Backoff(rng=random.Random())  # noqa: S311  jitter, no secret
    said = False
    question = _asked(ask)
    while not stop_event.is_set():
        health.turn()
        concurrent.futures.wait([question], _TURN_S)
        if not question.done():
            continue
        try:
            return question.result()
        except TransientError as exc:
            health.not_ready = str(exc)
            if not said:
                event("waiting_for_server", server=server, reason=str(exc))
                said = True
        stop_event.wait(backoff.next_wait_s())
        question = _asked(ask)
    raise _Told


def _asked(ask: Callable[[], T]) -> concurrent.futures.Future[T]:
    """The answer to come. Nothing interrupts a question to a server that is half gone, so nobody waits for its end."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            future.set_result(ask())
        except BaseException as exc:  # noqa: BLE001  whoever asks for the result gets it
            future.set_exception(exc)

    threading.Thread(target=work, daemon=True).start()
    return future


def _tune_interpreter() -> None:
    """Two threads that both compute, and batches of objects without cycles.

    The store's thread asks for the interpreter after every write to its socket; at the default of 5 ms the database
    would wait for us. The cycle collector looks at a whole batch again and again and finds nothing: let it look seldom.
    """
    sys.setswitchinterval(0.00005)
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


if __name__ == "__main__":
    set_up_logging()
    _tune_interpreter()
    status = run(lambda: main(sys.argv[1:], os.environ))
    sys.stdout.flush()
    sys.stderr.flush()
    # librdkafka's threads may be stuck in a dead network; nothing of ours is left to do.
    os._exit(status)
