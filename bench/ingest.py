"""Measure the consumer's throughput, latency and memory: ``python -m bench.ingest``.

The throughput is compared with raw COPY and with one INSERT per row, in the same run. The benchmark starts the servers
that it uses.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import attrs
import psutil
import psycopg
from confluent_kafka import Producer

import orderlib
from bench.report import Figure, add_write_option, print_progress, publish
from bench.servers import benchmark_servers
from orderlib.ingestion.consumer_core import MAX_RECORDS
from orderlib.postgres.rows import DELIVERY_COLUMNS, ITEM_COLUMNS, ORDER_COLUMNS, PAYMENT_COLUMNS
from sandbox.server import free_port
from services.kafka import SILENT_LOGGER
from services.sender.generate import generate_order

#: Loads at which the latency is measured, in orders/s.
LOADS = (1, 100, 1_000, 5_000)
#: Orders that wait at full speed: two batches.
WAITING_ORDERS = 4_000

TABLES = ("orders", "delivery", "payment", "items")

_EXPORT = {
    table: f"COPY (SELECT t.* FROM {table} t WHERE t.order_uid = ANY(%s)) TO STDOUT (FORMAT BINARY)" for table in TABLES
}


@attrs.frozen(kw_only=True)
class IngestBench:
    """The orders in the topic, and the database that they are stored in."""

    environ: Mapping[str, str]
    superuser_url: str
    orders: list[orderlib.Order]

    def empty(self) -> None:
        """Delete everything stored, the offsets too, and run a checkpoint so that none is due while measuring."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute("TRUNCATE orders, delivery, payment, items, order_originals, rejects, consumer_offsets")
            connection.execute("CHECKPOINT")

    def rewind(self) -> None:
        """Set every offset to 0, so that every record is handled again. The stored orders stay."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute("UPDATE consumer_offsets SET next_offset = 0")
            connection.execute("VACUUM orders, delivery, payment, items")
            connection.execute("CHECKPOINT")

    def rewind_to_mixed_records(self) -> None:
        """Set every offset to 0; then half of the records are duplicates, a quarter changed and a quarter new."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute("DELETE FROM orders WHERE hashtext(order_uid) & 3 = 0")
            connection.execute(
                "UPDATE orders SET content_sha256 = decode(repeat('00', 32), 'hex'), source_topic_id = NULL, "
                "source_partition = NULL, source_offset = NULL, source_time = NULL WHERE hashtext(order_uid) & 3 = 1"
            )
        self.rewind()

    def consume(self) -> float:
        """Run one consumer until the topic is handled. Return orders per second, from the first commit to the last."""
        with running(self.environ, "services.consumer"):
            return self._measure_rate()

    def consume_together(self, consumers: int) -> tuple[float, float]:
        """Run several consumers. Return orders per second, and the smallest share of one consumer (1 is an even share).

        The consumers join the group while there is no lag. Then the offsets are set to 0. A few new records make every
        consumer lose its fence, read the offsets again and start from 0.
        """
        with running_consumers(self.environ, consumers) as ports:
            with psycopg.connect(self.superuser_url, autocommit=True) as connection:
                connection.execute("TRUNCATE orders, delivery, payment, items, order_originals, rejects")
                connection.execute("UPDATE consumer_offsets SET next_offset = 0")
                connection.execute("CHECKPOINT")
            produce(self.environ, ((order.order_uid, orderlib.encode_order(order)) for order in self.orders[:100]))
            orders_per_s = self._measure_rate()
            shares = [sum(metric(port, "orders_records_total")) for port in ports]
        return orders_per_s, min(shares) * consumers / sum(shares)

    def _measure_rate(self) -> float:
        wait(lambda: self.handled() > 0)
        began_s, first = time.monotonic(), self.handled()
        wait(lambda: self.handled() >= len(self.orders))
        return (len(self.orders) - first) / (time.monotonic() - began_s)

    def handled(self) -> int:
        """Return the number of records below the stored offsets."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            row = connection.execute("SELECT coalesce(sum(next_offset), 0) FROM consumer_offsets").fetchone()
            assert row is not None
            return int(row[0])

    def prebuild(self) -> list[dict[str, bytes]]:
        """Return the stored orders as binary COPY data by table, in batches like the largest of the consumer."""
        batches = []
        with psycopg.connect(self.superuser_url) as connection, connection.cursor() as cursor:
            for at in range(0, len(self.orders), MAX_RECORDS):
                uids = [order.order_uid for order in self.orders[at : at + MAX_RECORDS]]
                batch = {}
                for table in TABLES:
                    with cursor.copy(_EXPORT[table].encode(), [uids]) as copy:
                        batch[table] = b"".join(bytes(block) for block in copy)
                batches.append(batch)
        return batches

    def raw_copy(self, batches: list[dict[str, bytes]]) -> float:
        """Return orders per second of binary COPY of prebuilt data in batches: the upper bound for ingest."""
        with psycopg.connect(self.environ["ORDERS_DATABASE_URL"], autocommit=True) as connection:
            began_s = time.monotonic()
            for batch in batches:
                with connection.transaction(), connection.cursor() as cursor:
                    for table in TABLES:
                        with cursor.copy(f"COPY {table} FROM STDIN (FORMAT BINARY)".encode()) as copy:
                            copy.write(batch[table])
            return len(self.orders) / (time.monotonic() - began_s)

    def one_insert_per_row(self, count: int) -> float:
        """Return orders per second with one INSERT per row and one transaction per order, decoding included."""
        values = [orderlib.encode_order(order) for order in self.orders[:count]]
        with psycopg.connect(self.environ["ORDERS_DATABASE_URL"], autocommit=True) as connection:
            began_s = time.monotonic()
            for value in values:
                _insert(connection, orderlib.decode_order(value))
            return count / (time.monotonic() - began_s)


def _insert(connection: psycopg.Connection, order: orderlib.Order) -> None:
    """Write an order with one INSERT per row, as the service that orderlib replaces does."""

    def placeholders(row: tuple[object, ...]) -> str:
        return ", ".join(["%s"] * len(row))

    def fields(model: object, columns: tuple[str, ...]) -> tuple[object, ...]:
        return tuple(getattr(model, name) for name in columns)

    uid, store_values = order.order_uid, (orderlib.content_sha256(order), None, None, None, None, "now", "now")
    rows = [
        ("orders", (*fields(order, ORDER_COLUMNS), *store_values)),
        ("delivery", (uid, *fields(order.delivery, DELIVERY_COLUMNS))),
        ("payment", (uid, *fields(order.payment, PAYMENT_COLUMNS))),
        *(("items", (uid, line, *fields(item, ITEM_COLUMNS))) for line, item in enumerate(order.items)),
    ]
    with connection.transaction():
        for table, row in rows:
            connection.execute(f"INSERT INTO {table} VALUES ({placeholders(row)})".encode(), row)


def produce(environ: Mapping[str, str], values: Iterator[tuple[str, bytes]]) -> None:
    """Send values, each with its key, and wait until all are acknowledged."""
    producer = Producer(
        {
            "bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"],
            "partitioner": "murmur2_random",
            "compression.type": "lz4",
            "linger.ms": 20,
            "acks": "all",
        },
        logger=SILENT_LOGGER,
    )
    for uid, value in values:
        while True:
            try:
                producer.produce(environ["ORDERS_TOPIC"], value, key=uid)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def admin(environ: Mapping[str, str], command: str) -> None:
    """Run a command of ``services.admin``."""
    subprocess.run(
        [sys.executable, "-m", "services.admin", *command.split()],
        env=dict(environ),
        check=True,
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def running(environ: Mapping[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module as a process. SIGTERM stops it at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env=dict(environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@contextmanager
def running_consumers(environ: Mapping[str, str], consumers: int) -> Iterator[Sequence[int]]:
    """Run this number of consumers. Yield the ports of their metrics as soon as each of them has partitions."""
    ports = [free_port() for _ in range(consumers)]
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(running({**environ, "ORDERS_METRICS_BIND": f"127.0.0.1:{port}"}, "services.consumer"))
        wait(lambda: all(metric(port, "orders_lag_records") for port in ports))
        yield ports


def throughput(bench: IngestBench, rounds: int) -> list[Figure]:
    """Measure the consumer, raw COPY and INSERTs one after another in each round.

    The figures are the medians of the rounds; a ratio compares values of the same round.
    """
    new, raw, inserts, duplicate, mixed = [], [], [], [], []
    batches: list[dict[str, bytes]] = []
    for number in range(rounds):
        print_progress(f"throughput, round {number + 1} of {rounds}")
        bench.empty()
        new.append(bench.consume())
        batches = batches or bench.prebuild()
        bench.rewind()
        duplicate.append(bench.consume())
        bench.rewind_to_mixed_records()
        mixed.append(bench.consume())
        bench.empty()
        raw.append(bench.raw_copy(batches))
        bench.empty()
        inserts.append(bench.one_insert_per_row(2_000))
    ratio = statistics.median(a / b for a, b in zip(new, raw, strict=True))
    return [
        Figure("ingest, Kafka to committed, all new", statistics.median(new), "orders/s"),
        Figure("ingest, all duplicates", statistics.median(duplicate), "orders/s"),
        Figure("ingest, half duplicates, a quarter changed", statistics.median(mixed), "orders/s"),
        Figure("raw COPY", statistics.median(raw), "orders/s"),
        Figure("one INSERT per row", statistics.median(inserts), "orders/s"),
        Figure("ingest / raw COPY", ratio, "×", at_least=0.75, goal=0.85),
        Figure(
            "ingest / one INSERT per row",
            statistics.median(a / b for a, b in zip(new, inserts, strict=True)),
            "×",
            at_least=20,
        ),
    ]


def timeline(bench: IngestBench) -> list[Figure]:
    """Measure where the store's thread spends its time at full speed. The rest is waiting for Python."""
    print_progress("timeline")
    bench.empty()
    port = free_port()
    with running({**bench.environ, "ORDERS_METRICS_BIND": f"127.0.0.1:{port}"}, "services.consumer"):
        wait(lambda: bench.handled() > 0)
        began_s, before = time.monotonic(), _step_seconds(port)
        wait(lambda: bench.handled() >= 0.9 * len(bench.orders))
        seconds, after = time.monotonic() - began_s, _step_seconds(port)
    return [
        Figure(f"full speed, store: {step}", 100 * (after[step] - before.get(step, 0.0)) / seconds, "% of the time")
        for step in after
    ]


def _step_seconds(port: int) -> dict[str, float]:
    """Return how many seconds the consumer has spent in each step of its batches."""
    found = re.findall(r'^orders_batch_seconds_sum{step="(\w+)"} (\S+)$', _metrics(port), re.MULTILINE)
    return {step: float(value) for step, value in found}


def batch_sizes(bench: IngestBench) -> list[Figure]:
    """Measure ``save_many`` alone, for several numbers of orders in a transaction."""
    figures = []
    for size in (1, 10, 100, 500, 2_000, 5_000):
        print_progress(f"batches of {size:,}")
        bench.empty()
        orders = bench.orders[: 20 * size + 1_000]
        with orderlib.connect(bench.environ["ORDERS_DATABASE_URL"]) as repository:
            began_s = time.monotonic()
            for at in range(0, len(orders), size):
                repository.save_many(orders[at : at + size])
            figures.append(
                Figure(f"save_many, {size:,} orders per call", len(orders) / (time.monotonic() - began_s), "orders/s")
            )
    return figures


def several_consumers(bench: IngestBench) -> list[Figure]:
    """Measure one, two and three consumers of one group with one database."""
    figures = []
    bench.empty()
    bench.consume()
    for consumers in (1, 2, 3):
        name = f"{consumers} consumer{'s' * (consumers > 1)}"
        print_progress(name)
        orders_per_s, balance = bench.consume_together(consumers)
        figures.append(Figure(f"ingest with {name}", orders_per_s, "orders/s"))
        if consumers > 1:
            figures.append(Figure(f"smallest share of {name}", 100 * balance, "% of an even share"))
    return figures


@attrs.frozen(kw_only=True)
class Latencies:
    """How long single orders took while others were sent, in seconds, and how many orders were handled a second."""

    readable_s: list[float]
    acknowledged_s: list[float]
    orders_per_s: float

    def figures(self, load: str) -> list[Figure]:
        """Return the figures of this load."""
        median_ms, p99_ms, goal_ms = (15, 40, 20) if load == "1,000 orders/s" else (None, None, None)
        return [
            Figure(
                f"{load}: sent to readable, median", 1000 * _quantile(self.readable_s, 0.5), "ms", at_most=median_ms
            ),
            Figure(
                f"{load}: sent to readable, p99",
                1000 * _quantile(self.readable_s, 0.99),
                "ms",
                at_most=p99_ms,
                goal=goal_ms,
            ),
            Figure(f"{load}: sent to acknowledged by Kafka, median", 1000 * _quantile(self.acknowledged_s, 0.5), "ms"),
            Figure(f"{load}: handled", self.orders_per_s, "orders/s"),
        ]


def _quantile(values: list[float], fraction: float) -> float:
    return sorted(values)[int(len(values) * fraction)]


def latency(bench: IngestBench, seconds: int) -> list[Figure]:
    """Measure the time from sending an order until a reader finds it, at several loads and at full speed."""
    figures = []
    for per_s in LOADS:
        print_progress(f"latency at {per_s:,} orders/s")
        figures += measure_latency(bench, per_s, seconds).figures(f"{per_s:,} orders/s")
    print_progress("latency at full speed")
    return figures + measure_latency(bench, None, seconds).figures("full speed")


def measure_latency(bench: IngestBench, per_s: int | None, seconds: int) -> Latencies:
    """Send orders at a rate, and measure single ones among them. ``None`` is full speed: the consumer is never idle.

    For full speed, ``WAITING_ORDERS`` orders wait at any time. The latency is then the time to handle these.
    """
    bench.empty()
    bench = attrs.evolve(bench, environ={**bench.environ, "ORDERS_TOPIC": f"latency-{per_s}-{time.time_ns()}"})
    admin(bench.environ, "topics")
    measured: tuple[list[float], list[float]] = ([], [])
    with (
        running(bench.environ, "services.consumer"),
        orderlib.connect(bench.environ["ORDERS_READER_URL"]) as repository,
    ):
        probe = _Probe(bench.environ, repository)
        # The first order is readable when the consumer has joined its group.
        probe.measure()
        ended = threading.Event()
        sending = threading.Thread(target=_send_at, args=(bench, per_s, ended))
        sending.start()
        time.sleep(2)
        began_s, first = time.monotonic(), bench.handled()
        pause_s = 1 if per_s == 1 else 0.01
        while time.monotonic() < began_s + seconds and (sending.is_alive() or per_s == 1):
            # At a random time: otherwise each order would be sent at the beginning of a transaction.
            time.sleep(probe.rng.uniform(0, 2 * pause_s))
            for values, value in zip(measured, probe.measure(), strict=True):
                values.append(value)
        orders_per_s = (bench.handled() - first) / (time.monotonic() - began_s)
        ended.set()
        sending.join()
    return Latencies(readable_s=measured[0], acknowledged_s=measured[1], orders_per_s=orders_per_s)


class _Probe:
    """Measures single orders."""

    def __init__(self, environ: Mapping[str, str], repository: orderlib.OrderRepository) -> None:
        self.rng = Random(5)
        self._topic = environ["ORDERS_TOPIC"]
        self._producer = _producer(environ)
        self._repository = repository

    def measure(self) -> tuple[float, float]:
        """Send an order. Return the seconds until a reader that polls finds it, and until Kafka acknowledged it."""
        order = generate_order(self.rng, utc_now)
        acknowledged_s: list[float] = []
        sent_s = time.monotonic()
        self._producer.produce(
            self._topic,
            orderlib.encode_order(order),
            key=order.order_uid,
            on_delivery=lambda *_: acknowledged_s.append(time.monotonic()),
        )
        while True:
            self._producer.poll(0.001)
            with contextlib.suppress(orderlib.OrderNotFound):
                self._repository.content_sha256(order.order_uid)
                readable_s = time.monotonic()
                self._producer.flush()
                return readable_s - sent_s, acknowledged_s[0] - sent_s


def _send_at(bench: IngestBench, per_s: int | None, ended: threading.Event) -> None:
    """Send the orders evenly, or as fast as they are handled, until all are sent or ``ended``."""
    values = [(order.order_uid, orderlib.encode_order(order)) for order in bench.orders] if per_s != 1 else []
    producer = _producer(bench.environ)
    began_s, sent = time.monotonic(), 0
    while sent < len(values) and not ended.wait(0.005):
        due = bench.handled() + WAITING_ORDERS if per_s is None else per_s * (time.monotonic() - began_s)
        until = int(due)
        for uid, value in values[sent:until]:
            producer.produce(bench.environ["ORDERS_TOPIC"], value, key=uid)
        sent = max(sent, min(until, len(values)))
        producer.poll(0)
    producer.flush()


def _producer(environ: Mapping[str, str]) -> Producer:
    """Return a producer with the defaults of the sender."""
    return Producer(
        {"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], "linger.ms": 5, "acks": "all"},
        logger=SILENT_LOGGER,
    )


def memory(bench: IngestBench, lags: tuple[int, int]) -> list[Figure]:
    """Measure the consumer's peak resident memory with a small and with a large lag."""
    peaks_mb = []
    values = [(order.order_uid, orderlib.encode_order(order)) for order in bench.orders[:10_000]]
    for lag in lags:
        print_progress(f"memory at a lag of {lag:,}")
        environ = {**bench.environ, "ORDERS_TOPIC": f"orders-{lag}", "ORDERS_METRICS_BIND": "127.0.0.1:0"}
        bench.empty()
        admin(environ, "topics")
        produce(environ, (values[i % len(values)] for i in range(lag)))
        with running(environ, "services.consumer") as process:
            watched = psutil.Process(process.pid)
            until_s = time.monotonic() + 25
            while time.monotonic() < until_s:
                time.sleep(0.05)
                if bench.handled() >= lag:
                    break
            peaks_mb.append(_peak_mb(watched))
    return [
        Figure(f"resident memory at a lag of {lags[0]:,}", peaks_mb[0], "MB", at_most=150),
        Figure(f"resident memory at a lag of {lags[1]:,}", peaks_mb[1], "MB", at_most=150),
        Figure("difference between the two", peaks_mb[1] - peaks_mb[0], "MB", at_most=10),
    ]


def _peak_mb(process: psutil.Process) -> float:
    """Return the peak resident memory that the kernel recorded, in MB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError("the kernel reports no VmHWM")


def metric(port: int, name: str) -> list[float]:
    """Return a metric's values, one for each set of labels; an empty list while the consumer is starting."""
    return [float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", _metrics(port), re.MULTILINE)]


def _metrics(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
            return str(response.read().decode())
    except OSError:
        return ""


def wait(condition: Callable[[], bool], timeout_s: float = 600) -> None:
    """Poll until the condition is true. Raise AssertionError after ``timeout_s``."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def utc_now() -> dt.datetime:
    """Return the time."""
    return dt.datetime.now(dt.UTC)


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.ingest", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="orders in the topic (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the throughput measurement (%(default)s)")
    parser.add_argument(
        "--latency-seconds", type=int, default=20, help="duration of the latency measurement (%(default)s)"
    )
    parser.add_argument(
        "--largest-lag", type=int, default=1_000_000, help="the larger lag of the memory measurement (%(default)s)"
    )
    add_write_option(parser)
    options = parser.parse_args()
    with benchmark_servers() as environ:
        figures = measure({**environ, "ORDERS_TOPIC": "orders", "ORDERS_METRICS_BIND": "127.0.0.1:0"}, options)
    publish("ingest", figures, write=options.write)


def measure(environ: Mapping[str, str], options: argparse.Namespace) -> list[Figure]:
    """Run every measurement on the servers of this environment. It empties their tables."""
    for command in ("bootstrap", "migrate", "topics"):
        admin(environ, command)
    rng = Random(1)
    print_progress(f"generating and sending {options.count:,} orders")
    orders = [generate_order(rng, utc_now) for _ in range(options.count)]
    produce(environ, ((order.order_uid, orderlib.encode_order(order)) for order in orders))
    bench = IngestBench(environ=environ, superuser_url=environ["ORDERS_BOOTSTRAP_URL"], orders=orders)
    return [
        *throughput(bench, options.rounds),
        *timeline(bench),
        *batch_sizes(bench),
        *several_consumers(bench),
        *latency(bench, options.latency_seconds),
        *memory(bench, (10_000, options.largest_lag)),
    ]


if __name__ == "__main__":
    main()
