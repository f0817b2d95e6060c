"""How fast, how late and how large the consumer is, beside raw COPY and one INSERT per row, in one run.

``python -m bench.ingest`` starts the servers that it uses, and no other.
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random

import attrs
import psutil
import psycopg
from confluent_kafka import Producer

import orderlib
from bench.report import Figure, add_write_option, publish
from bench.servers import own_servers
from orderlib.postgres.rows import DELIVERY_COLUMNS, ITEM_COLUMNS, ORDER_COLUMNS, PAYMENT_COLUMNS
from sandbox.server import free_port
from services.kafka import SILENT
from services.sender.generate import make_order

#: Records in a batch, as the consumer cuts them.
BATCH = 2_000

TABLES = ("orders", "delivery", "payment", "items")

_EXPORT = {
    table: f"COPY (SELECT t.* FROM {table} t WHERE t.order_uid = ANY(%s)) TO STDOUT (FORMAT BINARY)" for table in TABLES
}


@attrs.frozen(kw_only=True)
class Bench:
    """A topic full of orders, and a database to bring them to."""

    environ: Mapping[str, str]
    superuser_url: str
    orders: list[orderlib.Order]

    def empty(self) -> None:
        """Nothing stored, nothing handled; no checkpoint owed from before."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute("TRUNCATE orders, delivery, payment, items, rejects, consumer_offsets")
            connection.execute("CHECKPOINT")

    def rewind(self) -> None:
        """Everything is to be handled again."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute("UPDATE consumer_offsets SET next_offset = 0")
            connection.execute("VACUUM orders, delivery, payment, items")
            connection.execute("CHECKPOINT")

    def mix(self) -> None:
        """Everything is to be handled again: half of it duplicates, a quarter changed, a quarter new."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute("DELETE FROM orders WHERE hashtext(order_uid) & 3 = 0")
            connection.execute(
                "UPDATE orders SET content_sha256 = decode(repeat('00', 32), 'hex'), source_topic_id = NULL, "
                "source_partition = NULL, source_offset = NULL, source_time = NULL WHERE hashtext(order_uid) & 3 = 1"
            )
        self.rewind()

    def consume(self) -> float:
        """Orders a second from the first commit to the last, with one consumer."""
        with running(self.environ, "services.consumer"):
            return self._watch()

    def consume_together(self, consumers: int) -> tuple[float, float]:
        """Orders a second with so many consumers, and the least busy one's part of an even share.

        They join while nothing is to be done; then everything is set back under their feet, and a few new records make
        them see it.
        """
        ports = [free_port() for _ in range(consumers)]
        with ExitStack() as stack:
            for port in ports:
                environ = {**self.environ, "ORDERS_METRICS_BIND": f"127.0.0.1:{port}"}
                stack.enter_context(running(environ, "services.consumer"))
            wait(lambda: all(metric(port, "orders_lag_records") for port in ports))
            with psycopg.connect(self.superuser_url, autocommit=True) as connection:
                connection.execute("TRUNCATE orders, delivery, payment, items, rejects")
                connection.execute("UPDATE consumer_offsets SET next_offset = 0")
                connection.execute("CHECKPOINT")
            _produce(self.environ, ((order.order_uid, orderlib.encode_order(order)) for order in self.orders[:100]))
            orders_per_s = self._watch()
            shares = [sum(metric(port, "orders_records_total")) for port in ports]
        return orders_per_s, min(shares) * consumers / sum(shares)

    def _watch(self) -> float:
        wait(lambda: self.handled() > 0)
        began_s, first = time.monotonic(), self.handled()
        wait(lambda: self.handled() >= len(self.orders))
        return (len(self.orders) - first) / (time.monotonic() - began_s)

    def handled(self) -> int:
        """Records below the stored offsets."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            row = connection.execute("SELECT coalesce(sum(next_offset), 0) FROM consumer_offsets").fetchone()
            assert row is not None
            return int(row[0])

    def prebuilt(self) -> list[dict[str, bytes]]:
        """What is stored, as binary COPY data in batches."""
        batches = []
        with psycopg.connect(self.superuser_url) as connection, connection.cursor() as cursor:
            for at in range(0, len(self.orders), BATCH):
                uids = [order.order_uid for order in self.orders[at : at + BATCH]]
                batch = {}
                for table in TABLES:
                    with cursor.copy(_EXPORT[table].encode(), [uids]) as copy:
                        batch[table] = b"".join(bytes(block) for block in copy)
                batches.append(batch)
        return batches

    def raw_copy(self, batches: list[dict[str, bytes]]) -> float:
        """Orders a second by binary COPY of prebuilt data, a transaction a batch: nothing can be faster here."""
        with psycopg.connect(self.environ["ORDERS_DATABASE_URL"], autocommit=True) as connection:
            began_s = time.monotonic()
            for batch in batches:
                with connection.transaction(), connection.cursor() as cursor:
                    for table in TABLES:
                        with cursor.copy(f"COPY {table} FROM STDIN (FORMAT BINARY)".encode()) as copy:
                            copy.write(batch[table])
            return len(self.orders) / (time.monotonic() - began_s)

    def one_insert_per_row(self, count: int) -> float:
        """Orders a second with one INSERT per row and a transaction per order, decoding included: the old way."""
        values = [orderlib.encode_order(order) for order in self.orders[:count]]
        with psycopg.connect(self.environ["ORDERS_DATABASE_URL"], autocommit=True) as connection:
            began_s = time.monotonic()
            for value in values:
                _insert(connection, orderlib.decode_order(value))
            return count / (time.monotonic() - began_s)


def _insert(connection: psycopg.Connection, order: orderlib.Order) -> None:
    """An order as the services that we replace write it."""

    def values(row: tuple[object, ...]) -> str:
        return ", ".join(["%s"] * len(row))

    def fields(model: object, columns: tuple[str, ...]) -> tuple[object, ...]:
        return tuple(getattr(model, name) for name in columns)

    uid, of_the_store = order.order_uid, (orderlib.content_sha256(order), None, None, None, None, "now", "now")
    rows = [
        ("orders", (*fields(order, ORDER_COLUMNS), *of_the_store)),
        ("delivery", (uid, *fields(order.delivery, DELIVERY_COLUMNS))),
        ("payment", (uid, *fields(order.payment, PAYMENT_COLUMNS))),
        *(("items", (uid, line, *fields(item, ITEM_COLUMNS))) for line, item in enumerate(order.items)),
    ]
    with connection.transaction():
        for table, row in rows:
            connection.execute(f"INSERT INTO {table} VALUES ({values(row)})".encode(), row)


def _produce(environ: Mapping[str, str], values: Iterator[tuple[str, bytes]]) -> None:
    producer = Producer(
        {
            "bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"],
            "partitioner": "murmur2_random",
            "compression.type": "lz4",
            "linger.ms": 20,
            "acks": "all",
        },
        logger=SILENT,
    )
    for uid, value in values:
        while True:
            try:
                producer.produce(environ["ORDERS_TOPIC"], value, key=uid)
                break
            except BufferError:
                producer.poll(0.1)
    producer.flush()


def _admin(environ: Mapping[str, str], command: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "services.admin", *command.split()],
        env=dict(environ),
        check=True,
        stdout=subprocess.DEVNULL,
    )


@contextmanager
def running(environ: Mapping[str, str], *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of our programs meanwhile, and stop it cleanly."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command], env=dict(environ), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def throughput(bench: Bench, rounds: int) -> list[Figure]:
    """Consumer, raw COPY and INSERTs in turn, each round; medians, and ratios of the same round."""
    new, raw, inserts, duplicate, mixed = [], [], [], [], []
    batches: list[dict[str, bytes]] = []
    for number in range(rounds):
        _say(f"throughput, round {number + 1} of {rounds}")
        bench.empty()
        new.append(bench.consume())
        batches = batches or bench.prebuilt()
        bench.rewind()
        duplicate.append(bench.consume())
        bench.mix()
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
        Figure("ingest / raw COPY", ratio, "×", at_least=0.5, goal=0.7),
        Figure(
            "ingest / one INSERT per row",
            statistics.median(a / b for a, b in zip(new, inserts, strict=True)),
            "×",
            at_least=15,
            goal=20,
        ),
    ]


def batch_sizes(bench: Bench) -> list[Figure]:
    """The write path alone, by the number of orders in a transaction."""
    figures = []
    for size in (1, 10, 100, 500, 2_000, 5_000):
        _say(f"batches of {size:,}")
        bench.empty()
        orders = bench.orders[: 20 * size + 1_000]
        with orderlib.connect(bench.environ["ORDERS_DATABASE_URL"]) as repository:
            began_s = time.monotonic()
            for at in range(0, len(orders), size):
                repository.save_many(orders[at : at + size])
            figures.append(
                Figure(f"save_many, {size:,} at once", len(orders) / (time.monotonic() - began_s), "orders/s")
            )
    return figures


def several_consumers(bench: Bench) -> list[Figure]:
    """One, two and three consumers of one group, one database."""
    figures = []
    bench.empty()
    bench.consume()
    for consumers in (1, 2, 3):
        name = f"{consumers} consumer{'s' * (consumers > 1)}"
        _say(name)
        orders_per_s, balance = bench.consume_together(consumers)
        figures.append(Figure(f"ingest with {name}", orders_per_s, "orders/s"))
        if consumers > 1:
            figures.append(Figure(f"the least busy of {name}", 100 * balance, "% of an even share"))
    return figures


def latency(bench: Bench, seconds: int) -> list[Figure]:
    """From sent to readable, while 1,000 orders a second come in: what a reader sees who asks again and again."""
    _say("latency at 1,000 orders/s")
    bench.empty()
    environ = bench.environ
    rng = Random(5)
    producer = Producer(
        {"bootstrap.servers": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"], "linger.ms": 5, "acks": "all"}, logger=SILENT
    )
    waits_s = []
    with (
        running({**environ, "ORDERS_METRICS_BIND": "127.0.0.1:0"}, "services.consumer"),
        orderlib.connect(environ["ORDERS_READER_URL"]) as repository,
    ):
        wait(lambda: bench.handled() >= len(bench.orders))
        with running(environ, "services.sender", "--count", "1000000", "--rate", "1000"):
            until_s = time.monotonic() + seconds
            time.sleep(2)
            while time.monotonic() < until_s:
                order = make_order(rng, _utc_now)
                sent_s = time.monotonic()
                producer.produce(environ["ORDERS_TOPIC"], orderlib.encode_order(order), key=order.order_uid)
                producer.poll(0)
                while True:
                    try:
                        repository.content_sha256(order.order_uid)
                        break
                    except orderlib.OrderNotFound:
                        producer.poll(0.001)
                waits_s.append(time.monotonic() - sent_s)
        producer.flush()
    waits_s.sort()
    return [
        Figure("sent to readable at 1,000 orders/s, median", 1000 * statistics.median(waits_s), "ms"),
        Figure(
            "sent to readable at 1,000 orders/s, 99 of 100",
            1000 * waits_s[int(len(waits_s) * 0.99)],
            "ms",
            at_most=200,
        ),
    ]


def memory(bench: Bench, lags: tuple[int, int]) -> list[Figure]:
    """The consumer's largest resident memory, with little and with much before it."""
    peaks = []
    values = [(order.order_uid, orderlib.encode_order(order)) for order in bench.orders[:10_000]]
    for lag in lags:
        _say(f"memory at {lag:,} of lag")
        environ = {**bench.environ, "ORDERS_TOPIC": f"orders-{lag}", "ORDERS_METRICS_BIND": "127.0.0.1:0"}
        bench.empty()
        _admin(environ, "topics")
        _produce(environ, (values[i % len(values)] for i in range(lag)))
        with running(environ, "services.consumer") as process:
            watched = psutil.Process(process.pid)
            until_s = time.monotonic() + 25
            while time.monotonic() < until_s:
                time.sleep(0.05)
                if bench.handled() >= lag:
                    break
            peaks.append(_peak_mib(watched))
    return [
        Figure(f"resident at {lags[0]:,} of lag", peaks[0], "MB", at_most=150),
        Figure(f"resident at {lags[1]:,} of lag", peaks[1], "MB", at_most=150),
        Figure("more at the larger lag", peaks[1] - peaks[0], "MB", at_most=10),
    ]


def _peak_mib(process: psutil.Process) -> float:
    """The kernel's own high-water mark, in MB."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise AssertionError("the kernel keeps no VmHWM")


def metric(port: int, name: str) -> list[float]:
    """The values of a metric of a consumer, one for each set of labels; none while it starts."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return []
    return [float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", text, re.MULTILINE)]


def wait(condition: Callable[[], bool], within_s: float = 600) -> None:
    """Poll until it holds."""
    deadline_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def _utc_now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.ingest", description=__doc__)
    parser.add_argument("--count", type=int, default=100_000, help="orders in the topic (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the throughput (%(default)s)")
    parser.add_argument("--latency-seconds", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--largest-lag", type=int, default=1_000_000, help="(%(default)s)")
    add_write_option(parser)
    options = parser.parse_args()
    with own_servers() as environ:
        figures = measure({**environ, "ORDERS_TOPIC": "orders", "ORDERS_METRICS_BIND": "127.0.0.1:0"}, options)
    publish("ingest", figures, write=options.write)


def measure(environ: Mapping[str, str], options: argparse.Namespace) -> list[Figure]:
    """Measure everything on the servers of this environment. It empties their tables."""
    for command in ("bootstrap", "migrate", "topics"):
        _admin(environ, command)
    rng = Random(1)
    _say(f"making and sending {options.count:,} orders")
    orders = [make_order(rng, _utc_now) for _ in range(options.count)]
    _produce(environ, ((order.order_uid, orderlib.encode_order(order)) for order in orders))
    bench = Bench(environ=environ, superuser_url=environ["ORDERS_BOOTSTRAP_URL"], orders=orders)
    return [
        *throughput(bench, options.rounds),
        *batch_sizes(bench),
        *several_consumers(bench),
        *latency(bench, options.latency_seconds),
        *memory(bench, (10_000, options.largest_lag)),
    ]


if __name__ == "__main__":
    main()
