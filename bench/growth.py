"""Measure ingest and GET while the tables grow: ``python -m bench.growth``; ``make bench-growth`` runs this.

Each size is measured twice, with PostgreSQL's default settings and with settings for this machine's memory. The
order_uids are random. The largest size is measured in turns with the smallest, in a second database, because the speed
of a shared machine changes during the run: the ratios are medians of these pairs. Autovacuum is off. The benchmark
starts its servers, and needs ``wrk`` on PATH and 4 KB of disk for each order.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import TypeVar

import attrs
import psutil
import psycopg
from psycopg.conninfo import make_conninfo

import orderlib
from bench.api import VARIANTS, run_wrk, serving
from bench.ingest import TABLES, IngestBench, admin, produce, running_consumers, utc_now, wait
from bench.report import Figure, add_write_option, print_progress, publish
from bench.servers import benchmark_sandbox
from sandbox import Sandbox
from services.sender.generate import generate_order

T = TypeVar("T")

#: How many orders the tables have when the last of the settings are measured; before, they have somewhat fewer.
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
#: One order in 20 is added last, in random order. Then most pages of the indexes were written to the log since the last
#: checkpoint, as those of a server that has run for a while.
WARM_UP_ONE_IN = 20
#: Orders that the consumer stores before each measurement of ingest.
WARM_UP_ORDERS = 20_000
#: Orders that the consumer stores at each measurement.
NEW_ORDERS = 40_000
#: Orders that are read at random at each measurement of GET.
READ_ORDERS = 1_000_000
#: How long orders are read before each measurement, in seconds. Then the pages that are read most are in
#: ``shared_buffers``.
WARM_UP_READS_S = 15
#: The orders that all others are copies of, with other order_uids, track numbers and rids. Their customers are 39 % of
#: those that the sender knows.
TEMPLATES = 5_000
CONNECTIONS = 16
#: How often the largest and the smallest size are measured in turns.
ROUNDS = 5

_MEMORY_MB = psutil.virtual_memory().total // 2**20
#: PostgreSQL's settings by name: its defaults, and the ones that docs/tune.md recommends where lz4 is not built in, as
#: in the sandbox's PostgreSQL.
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "default settings": {},
    "settings for the memory": {
        "shared_buffers": f"{_MEMORY_MB // 4}MB",
        "max_wal_size": f"{min(4 * _MEMORY_MB, 16384)}MB",
        "checkpoint_timeout": "15min",
    },
}

_UID = "substr(md5(t.order_uid || n), 1, 15) || 'test'"
#: What differs between the copies of an order, by column. The keys have the form that the sender gives them, so that
#: those of new orders are spread over the whole index. The times ascend, as those of new orders do.
_CHANGED = {
    "order_uid": _UID,
    "track_number": "left(t.track_number, -14) || upper(substr(md5(n || t.order_uid), 1, 10)) || 'TEST'",
    "transaction": _UID,
    "rid": "substr(md5(n || t.rid), 1, 16) || 'test'",
    "first_stored_at": "now() - interval '1 day' + n * interval '1 ms'",
    "stored_at": "now() - interval '1 day' + n * interval '1 ms'",
}


@attrs.frozen
class Measurement:
    """What was measured at one size with the same settings."""

    orders_per_s: float
    #: With two consumers.
    orders_per_s_of_two: float
    p50_ms: float
    p99_ms: float


#: The smallest and the largest size, measured one after the other.
Pair = tuple[Measurement, Measurement]


@attrs.define(kw_only=True)
class GrowthBench:
    """The servers, and a database whose tables grow."""

    sandbox: Sandbox
    environ: Mapping[str, str]
    folder: str
    rng: Random
    #: How many copies of each template the tables have.
    copies: int = 0
    #: How many orders the consumer has added to the copies.
    consumed: int = 0

    @property
    def _superuser_url(self) -> str:
        return self.environ["ORDERS_BOOTSTRAP_URL"]

    def _connect(self) -> psycopg.Connection:
        return psycopg.connect(self._superuser_url, autocommit=True)

    def second_database(self, name: str) -> GrowthBench:
        """Create another database on the same server, without tables."""
        with self._connect() as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        environ = {
            variable: make_conninfo(value, dbname=name) if value.startswith("postgresql:") else value
            for variable, value in self.environ.items()
        }
        return attrs.evolve(self, environ=environ)

    def set_up(self) -> None:
        """Create the roles, the empty tables, and the orders that the others are copies of."""
        for command in ("bootstrap", "migrate"):
            admin(self.environ, command)
        with orderlib.connect(self.environ["ORDERS_DATABASE_URL"]) as repository:
            repository.save_many(generate_order(self.rng, utc_now) for _ in range(TEMPLATES))
        with self._connect() as connection:
            connection.execute("CREATE EXTENSION pg_prewarm")
            for table in TABLES:
                connection.execute(f"CREATE TABLE template_{table} AS TABLE {table}".encode())
        self._empty()

    def shrink_to(self, orders: int) -> None:
        """Delete every order, and add copies of the templates, up to this number of orders."""
        self._empty()
        self.grow_to(orders)

    def _empty(self) -> None:
        with self._connect() as connection:
            connection.execute(f"TRUNCATE {', '.join(TABLES)} CASCADE".encode())
        self.copies = self.consumed = 0

    def grow_to(self, orders: int) -> None:
        """Add copies of the templates, until the tables have this number of orders."""
        # Sorted, each page of the primary key is changed once. It becomes as full as after random inserts.
        self._copy_all(orders - self.consumed - self.copies * TEMPLATES, "ORDER BY 1")
        with self._connect() as connection:
            connection.execute(f"VACUUM ANALYZE {', '.join(TABLES)}".encode())

    def warm_up(self, orders: int) -> None:
        """Add this number of copies in random order, as new orders arrive."""
        self._copy_all(orders, "")

    def _copy_all(self, orders: int, order_by: str) -> None:
        copies = self.copies + orders // TEMPLATES
        with ThreadPoolExecutor(len(TABLES)) as threads:
            list(threads.map(lambda table: self._copy(table, self.copies, copies, order_by), TABLES))
        self.copies = copies

    def _copy(self, table: str, begin: int, end: int, order_by: str) -> None:
        with self._connect() as connection:
            # The rows fit together, so their foreign keys need no check.
            connection.execute("SET session_replication_role = replica")
            connection.execute("SET synchronous_commit = off")
            connection.execute("SET work_mem = '256MB'")
            found = connection.execute(f"SELECT * FROM template_{table} LIMIT 0".encode())
            assert found.description is not None
            columns = [column.name for column in found.description]
            changed = (f"{_CHANGED.get(column, f't.{column}')} AS {column}" for column in columns)
            connection.execute(
                f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(changed)} "
                f"FROM template_{table} t, generate_series({begin}, {end - 1}) n {order_by}".encode()
            )

    def use(self, settings: Mapping[str, str]) -> None:
        """Restart PostgreSQL with these settings, and begin after a checkpoint."""
        with self._connect() as connection:
            connection.execute("ALTER SYSTEM RESET ALL")
            for name, value in {**settings, "autovacuum": "off"}.items():
                connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
        self.sandbox.postgres.stop()
        self.sandbox.postgres.start()
        self._checkpoint()

    def _checkpoint(self) -> None:
        with self._connect() as connection:
            connection.execute("CHECKPOINT")

    def _checkpoint_count(self) -> int:
        """Return how many checkpoints have begun."""
        with self._connect() as connection:
            row = connection.execute("SELECT num_timed + num_requested FROM pg_stat_checkpointer").fetchone()
        assert row is not None
        return int(row[0])

    def measure(self, seconds: int) -> Measurement:
        """Measure ingest, and GET for this time."""
        return Measurement(self.orders_per_s(1), self.orders_per_s(2), *self.get_ms(seconds))

    def orders_per_s(self, consumers: int) -> float:
        """Return how many new orders this number of consumers stores per second."""
        # Not while the disk is busy with what was stored before.
        os.sync()
        environ = {**self.environ, "ORDERS_TOPIC": f"orders-{time.time_ns()}"}
        admin(environ, "topics")
        orders = [generate_order(self.rng, utc_now) for _ in range(WARM_UP_ORDERS + NEW_ORDERS)]
        values = [(order.order_uid, orderlib.encode_order(order)) for order in orders]
        bench = IngestBench(environ=environ, superuser_url=self._superuser_url, orders=orders)
        before, checkpoints = bench.handled(), self._checkpoint_count()
        with running_consumers(environ, consumers):
            produce(environ, iter(values))
            wait(lambda: bench.handled() - before >= WARM_UP_ORDERS)
            began_s, first = time.monotonic(), bench.handled() - before
            wait(lambda: bench.handled() - before >= len(orders))
            elapsed_s = time.monotonic() - began_s
        if self._checkpoint_count() > checkpoints:
            print_progress("a checkpoint began during this measurement, so whole pages were written to the log")
        self.consumed += len(orders)
        return (len(orders) - first) / elapsed_s

    def get_ms(self, seconds: int) -> tuple[float, float]:
        """Return p50 and p99 of GET in ms, for random orders."""
        # Reads should not write the pages that ingest has changed.
        self._checkpoint()
        self._load()
        requests = self._requests()
        with serving(self.environ, VARIANTS[0]) as (port, process):
            run_wrk(port, process, requests, CONNECTIONS, WARM_UP_READS_S)
            result = run_wrk(port, process, requests, CONNECTIONS, seconds)
        return result.p50_ms, result.p99_ms

    def _load(self) -> None:
        """Load what GET reads into the kernel's cache: tables, then primary keys, as far as they fit.

        A server that has run for a while has read them all. This takes seconds; random reads would take an hour.
        """
        with self._connect() as connection:
            for relation in (*TABLES, *(f"{table}_pkey" for table in TABLES)):
                connection.execute("SELECT pg_prewarm(%s::regclass, 'read')", [relation])

    def _requests(self) -> str:
        """Return a Lua script that requests random orders. A file has their order_uids."""
        with self._connect() as connection:
            templates = [uid for (uid,) in connection.execute("SELECT order_uid FROM template_orders")]
        chosen = (f"{self.rng.choice(templates)}{self.rng.randrange(self.copies)}" for _ in range(READ_ORDERS))
        uids = Path(self.folder) / "uids"
        uids.write_text(
            "\n".join(f"{hashlib.md5(one.encode(), usedforsecurity=False).hexdigest()[:15]}test" for one in chosen)
        )
        return (
            f"local uids = {{}}\nfor line in io.lines('{uids}') do uids[#uids + 1] = line end\n"
            'request = function() return wrk.format("GET", "/orders/" .. uids[math.random(#uids)]) end'
        )

    def sizes_mb(self) -> tuple[float, float]:
        """Return the size of the tables and of their indexes in MB."""
        with self._connect() as connection:
            row = connection.execute(
                "SELECT sum(pg_table_size(t::regclass)), sum(pg_indexes_size(t::regclass)) FROM unnest(%s::text[]) t",
                [list(TABLES)],
            ).fetchone()
        assert row is not None
        return float(row[0]) / 1e6, float(row[1]) / 1e6


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument(
        "--orders", type=int, choices=SIZES[1:], default=SIZES[-1], help="the largest size (%(default)s)"
    )
    parser.add_argument("--seconds", type=int, default=5, help="duration of each measurement of GET (%(default)s)")
    add_write_option(parser)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        sys.exit("error: bench.growth needs wrk (apt-get install wrk)")
    with benchmark_sandbox() as (sandbox, environ), tempfile.TemporaryDirectory() as folder:
        figures = measure(GrowthBench(sandbox=sandbox, environ=environ, folder=folder, rng=Random(9)), options)
    publish("growth", figures, write=options.write)


def measure(bench: GrowthBench, options: argparse.Namespace) -> list[Figure]:
    """Grow the tables step by step, and measure each size with each of the settings."""
    sizes = [size for size in SIZES if size <= options.orders]
    smallest = bench.second_database("smallest")
    for one in (smallest, bench):
        one.set_up()
    measured: dict[str, dict[int, Measurement]] = {name: {} for name in SETTINGS}
    pairs: dict[str, list[Pair]] = {}
    sizes_mb: dict[int, tuple[float, float]] = {}
    for size in sizes:
        print_progress(f"growing to {size:,} orders")
        if size == sizes[0]:
            # It is measured in the other database.
            bench.grow_to(size)
            sizes_mb[size] = bench.sizes_mb()
            continue
        rounds = ROUNDS if size == sizes[-1] else 1
        warm_up, consumed = size // WARM_UP_ONE_IN, rounds * 2 * (WARM_UP_ORDERS + NEW_ORDERS)
        # The server still has the last of the settings.
        bench.grow_to(size - len(SETTINGS) * warm_up - (len(SETTINGS) - 1) * consumed)
        for name, settings in SETTINGS.items():
            bench.use(settings)
            bench.warm_up(warm_up)
            sizes_mb[size] = bench.sizes_mb()
            if size == sizes[-1]:
                pairs[name] = _measure_pairs(smallest, bench, options.seconds)
                small, large = zip(*pairs[name], strict=True)
                measured[name] = {sizes[0]: _median(small), **measured[name], size: _median(large)}
            else:
                measured[name][size] = bench.measure(options.seconds)
            print_progress(f"{size:,} orders, {name}: {measured[name][size]}")
    return [*_ratios(pairs, sizes[-1]), *_details(measured), *_sizes(sizes_mb)]


def _measure_pairs(smallest: GrowthBench, largest: GrowthBench, seconds: int) -> list[Pair]:
    """Measure both databases in turns. Ingest comes first, because random reads displace pages of the indexes."""

    def ingest_smallest(consumers: int) -> float:
        warm_up = SIZES[0] // WARM_UP_ONE_IN
        smallest.shrink_to(SIZES[0] - warm_up)
        smallest.warm_up(warm_up)
        return smallest.orders_per_s(consumers)

    one, two = (
        _in_turns(
            f"orders/s, consumers: {consumers}",
            functools.partial(ingest_smallest, consumers),
            functools.partial(largest.orders_per_s, consumers),
        )
        for consumers in (1, 2)
    )
    reads = _in_turns("p50 and p99 in ms", lambda: smallest.get_ms(seconds), lambda: largest.get_ms(seconds))
    return [
        (Measurement(small_one, small_two, *small_reads), Measurement(large_one, large_two, *large_reads))
        for (small_one, large_one), (small_two, large_two), (small_reads, large_reads) in zip(
            one, two, reads, strict=True
        )
    ]


def _in_turns(what: str, small: Callable[[], T], large: Callable[[], T]) -> list[tuple[T, T]]:
    """Return the pairs of values. Every other round begins with the large one."""
    pairs = []
    for number in range(1, ROUNDS + 1):
        if number % 2:
            small_value, large_value = small(), large()
        else:
            large_value, small_value = large(), small()
        print_progress(f"round {number} of {ROUNDS}: smallest {small_value}, largest {large_value} {what}")
        pairs.append((small_value, large_value))
    return pairs


def _median(measurements: Iterable[Measurement]) -> Measurement:
    return Measurement(*map(statistics.median, zip(*map(attrs.astuple, measurements), strict=True)))


def _ratios(pairs: Mapping[str, Sequence[Pair]], largest: int) -> list[Figure]:
    """Return the values at the largest size divided by those at the smallest."""
    figures = []
    for name, rounds in pairs.items():
        limited = bool(SETTINGS[name])
        sizes = f"{largest:,} / {SIZES[0]:,} orders, {name}"
        ingest = statistics.median(large.orders_per_s / small.orders_per_s for small, large in rounds)
        with_two = statistics.median(large.orders_per_s_of_two / small.orders_per_s_of_two for small, large in rounds)
        with_another = statistics.median(large.orders_per_s_of_two / small.orders_per_s for small, large in rounds)
        p50 = statistics.median(large.p50_ms / small.p50_ms for small, large in rounds)
        p99 = statistics.median(large.p99_ms / small.p99_ms for small, large in rounds)
        figures += [
            Figure(f"ingest, {sizes}", ingest, "×", at_least=0.8 if limited else None),
            Figure(f"ingest with 2 consumers, {sizes}", with_two, "×"),
            Figure(
                f"ingest with 2 consumers at {largest:,} / with 1 at {SIZES[0]:,} orders, {name}", with_another, "×"
            ),
            Figure(f"GET p50, {sizes}", p50, "×"),
            Figure(f"GET p99, {sizes}", p99, "×", at_most=1.5 if limited else None),
        ]
    return figures


def _details(measured: Mapping[str, Mapping[int, Measurement]]) -> list[Figure]:
    figures = []
    for name, by_size in measured.items():
        for size, one in by_size.items():
            prefix = f"{size:,} orders, {name}"
            figures += [
                Figure(f"{prefix}: ingest", one.orders_per_s, "orders/s"),
                Figure(f"{prefix}: ingest with 2 consumers", one.orders_per_s_of_two, "orders/s"),
                Figure(f"{prefix}: GET p50", one.p50_ms, "ms"),
                Figure(f"{prefix}: GET p99", one.p99_ms, "ms"),
            ]
    return figures


def _sizes(sizes_mb: Mapping[int, tuple[float, float]]) -> list[Figure]:
    figures = []
    for size, (tables_mb, indexes_mb) in sizes_mb.items():
        figures += [
            Figure(f"{size:,} orders: tables", tables_mb, "MB"),
            Figure(f"{size:,} orders: indexes", indexes_mb, "MB"),
        ]
    return figures


if __name__ == "__main__":
    main()
