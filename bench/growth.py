"""Measure ingest and GET while the tables grow: ``python -m bench.growth``; ``make bench-growth`` runs this.

Each size is measured twice, with PostgreSQL's default settings and with settings for this machine's memory. The
order_uids are random. The largest size is measured in turns with the smallest, in a second database, because the speed
of a shared machine changes during the run: the ratios are medians of these pairs. The benchmark starts its servers, and
needs ``wrk`` on PATH and 2.5 KB of disk for each order.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import attrs
import psutil
import psycopg
from psycopg.conninfo import make_conninfo

import orderlib
from bench.api import VARIANTS, run_wrk, serving
from bench.ingest import TABLES, IngestBench, admin, produce, running, utc_now, wait
from bench.report import Figure, add_write_option, print_progress, publish
from bench.servers import benchmark_sandbox
from sandbox import Sandbox
from services.sender.generate import generate_order

#: How many orders the tables have before each measurement, without those that are added to warm up. A measurement adds
#: ``WARM_UP_ORDERS`` and ``NEW_ORDERS``.
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
#: The part of the orders that is added again before each measurement, in random order. Then most pages of the indexes
#: were written to the log since the last checkpoint, as those of a server that has run for a while.
WARM_UP = 0.05
#: Orders that the consumer stores before each measurement.
WARM_UP_ORDERS = 20_000
#: Orders that the consumer stores at each measurement.
NEW_ORDERS = 40_000
#: Orders that are read at random at each measurement.
READ_ORDERS = 1_000_000
#: How long orders are read before each measurement, in seconds. This fills the shared buffers.
WARM_UP_READS_S = 15
#: The orders that all others are copies of, with other order_uids, track numbers and rids.
TEMPLATES = 2_000
CONNECTIONS = 16
#: How often the largest and the smallest size are measured in turns.
ROUNDS = 3

_MEMORY_MB = psutil.virtual_memory().total // 2**20
#: PostgreSQL's settings by name: its defaults, and the ones that docs/tune.md recommends.
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "default settings": {},
    "settings for the memory": {
        "shared_buffers": f"{_MEMORY_MB // 4}MB",
        "max_wal_size": f"{min(4 * _MEMORY_MB, 16384)}MB",
        "checkpoint_timeout": "15min",
        "wal_compression": "on",
    },
}

_UID = "substr(md5(t.order_uid || n), 1, 15) || 'test'"
_RANDOM = "upper(substr(md5(n || t.order_uid), 1, 14))"
#: What differs between the copies of an order, by column. The times ascend, as those of new orders do.
_CHANGED = {
    "order_uid": _UID,
    "track_number": _RANDOM,
    "transaction": _UID,
    "rid": f"{_RANDOM} || t.line",
    "first_stored_at": "now() - interval '1 day' + n * interval '1 ms'",
    "stored_at": "now() - interval '1 day' + n * interval '1 ms'",
}


@attrs.frozen(kw_only=True)
class Measurement:
    """What was measured at one size with the same settings."""

    orders_per_s: float
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

    @property
    def _superuser_url(self) -> str:
        return self.environ["ORDERS_BOOTSTRAP_URL"]

    def second_database(self, name: str) -> GrowthBench:
        """Create another database on the same server, without tables."""
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        environ = {
            variable: make_conninfo(value, dbname=name) if value.startswith("postgresql:") else value
            for variable, value in self.environ.items()
        }
        return attrs.evolve(self, environ=environ, copies=0)

    def set_up(self) -> None:
        """Create the roles and the tables, and store the orders that the others are copies of."""
        for command in ("bootstrap", "migrate"):
            admin(self.environ, command)
        with orderlib.connect(self.environ["ORDERS_DATABASE_URL"]) as repository:
            repository.save_many(generate_order(self.rng, utc_now) for _ in range(TEMPLATES))
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            for table in TABLES:
                connection.execute(f"CREATE TABLE template_{table} AS TABLE {table}".encode())

    def shrink_to(self, orders: int) -> None:
        """Delete every order, and add copies of the templates, up to this number of orders."""
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            connection.execute(f"TRUNCATE {', '.join(TABLES)} CASCADE".encode())
        self.copies = 0
        self.grow_to(orders)

    def grow_to(self, orders: int) -> None:
        """Add copies of the templates, up to this number of orders."""
        # Sorted, each page of the primary key is changed once. It becomes as full as after random inserts.
        self._copy_all(orders // TEMPLATES, "ORDER BY 1")
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            connection.execute(f"VACUUM ANALYZE {', '.join(TABLES)}".encode())

    def warm_up(self) -> None:
        """Add copies of each template as new orders arrive, each on other pages than the one before."""
        self._copy_all(self.copies + math.ceil(self.copies * WARM_UP), "")

    def _copy_all(self, copies: int, order_by: str) -> None:
        with ThreadPoolExecutor(len(TABLES)) as threads:
            list(threads.map(lambda table: self._copy(table, self.copies, copies, order_by), TABLES))
        self.copies = copies

    def _copy(self, table: str, begin: int, end: int, order_by: str) -> None:
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
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
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET ALL")
            for name, value in settings.items():
                connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
        self.sandbox.postgres.stop()
        self.sandbox.postgres.start()
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            connection.execute("CHECKPOINT")

    def measure(self, seconds: int) -> Measurement:
        """Measure ingest, and GET for this time."""
        # Not while the disk is busy with what was stored before.
        os.sync()
        orders_per_s = self._orders_per_s()
        p50_ms, p99_ms = self._get_ms(seconds)
        return Measurement(orders_per_s=orders_per_s, p50_ms=p50_ms, p99_ms=p99_ms)

    def _orders_per_s(self) -> float:
        """Return how many new orders a consumer stores per second."""
        environ = {**self.environ, "ORDERS_TOPIC": f"orders-{time.time_ns()}", "ORDERS_METRICS_BIND": "127.0.0.1:0"}
        admin(environ, "topics")
        orders = [generate_order(self.rng, utc_now) for _ in range(WARM_UP_ORDERS + NEW_ORDERS)]
        produce(environ, ((order.order_uid, orderlib.encode_order(order)) for order in orders))
        bench = IngestBench(environ=environ, superuser_url=self._superuser_url, orders=orders)
        before = bench.handled()
        with running(environ, "services.consumer"):
            wait(lambda: bench.handled() - before >= WARM_UP_ORDERS)
            began_s, first = time.monotonic(), bench.handled() - before
            wait(lambda: bench.handled() - before >= len(orders))
            return (len(orders) - first) / (time.monotonic() - began_s)

    def _get_ms(self, seconds: int) -> tuple[float, float]:
        """Return p50 and p99 of GET in ms, for random orders."""
        os.sync()
        self._read_files()
        requests = self._requests()
        with serving(self.environ, VARIANTS[0]) as (port, process):
            run_wrk(port, process, requests, CONNECTIONS, WARM_UP_READS_S)
            result = run_wrk(port, process, requests, CONNECTIONS, seconds)
        return result.p50_ms, result.p99_ms

    def _read_files(self) -> None:
        """Read every page of the tables, then of the indexes. The kernel keeps as many of them as fit into memory.

        A server that has run for a while has read them all. This takes seconds; random reads would take an hour.
        """
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            rows = connection.execute(
                "SELECT current_setting('data_directory'), pg_relation_filepath(oid) FROM pg_class WHERE relkind IN "
                "('r', 'i') AND (oid = ANY(%(tables)s::regclass[]) OR oid IN "
                "(SELECT indexrelid FROM pg_index WHERE indrelid = ANY(%(tables)s::regclass[]))) "
                "ORDER BY relkind DESC, relname",
                {"tables": list(TABLES)},
            ).fetchall()
        for folder, name in rows:
            # A large relation has several files: NAME, NAME.1, …
            for path in [Path(folder, name), *Path(folder, name).parent.glob(f"{Path(name).name}.*")]:
                with path.open("rb", buffering=0) as file:
                    while file.read(2**20):
                        pass

    def _requests(self) -> str:
        """Return a Lua script that requests random orders. A file has their order_uids."""
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
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
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
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
    size_figures: list[Figure] = []
    for size in sizes:
        print_progress(f"growing to {size:,} orders")
        # The restart with the last of the settings is still in effect; the first size has few pages.
        bench.grow_to(size)
        tables_mb, indexes_mb = bench.sizes_mb()
        size_figures += [
            Figure(f"{size:,} orders: tables", tables_mb, "MB"),
            Figure(f"{size:,} orders: indexes", indexes_mb, "MB"),
        ]
        if size == sizes[0]:
            # It is measured in the other database.
            continue
        for name, settings in SETTINGS.items():
            bench.use(settings)
            bench.warm_up()
            if size == sizes[-1]:
                pairs[name] = [_pair(smallest, bench, number, options.seconds) for number in range(ROUNDS)]
                small, large = zip(*pairs[name], strict=True)
                measured[name] = {sizes[0]: _median(small), **measured[name], size: _median(large)}
            else:
                measured[name][size] = bench.measure(options.seconds)
            print_progress(f"{size:,} orders, {name}: {measured[name][size]}")
    return [*_ratios(pairs, sizes[-1]), *_details(measured), *size_figures]


def _pair(smallest: GrowthBench, largest: GrowthBench, number: int, seconds: int) -> Pair:
    """Measure both databases. Every other round begins with the largest."""

    def measure_smallest() -> Measurement:
        smallest.shrink_to(SIZES[0])
        smallest.warm_up()
        return smallest.measure(seconds)

    if number % 2:
        large, small = largest.measure(seconds), measure_smallest()
    else:
        small, large = measure_smallest(), largest.measure(seconds)
    print_progress(f"round {number + 1} of {ROUNDS}: {small}, {large}")
    return small, large


def _median(measurements: Iterable[Measurement]) -> Measurement:
    values = zip(*map(attrs.astuple, measurements), strict=True)
    return Measurement(**dict(zip(attrs.fields_dict(Measurement), map(statistics.median, values), strict=True)))


def _ratios(pairs: Mapping[str, Sequence[Pair]], largest: int) -> list[Figure]:
    """Return the values at the largest size divided by those at the smallest."""
    figures = []
    for name, rounds in pairs.items():
        limited = bool(SETTINGS[name])
        sizes = f"{largest:,} / {SIZES[0]:,} orders, {name}"
        ingest = statistics.median(large.orders_per_s / small.orders_per_s for small, large in rounds)
        p50 = statistics.median(large.p50_ms / small.p50_ms for small, large in rounds)
        p99 = statistics.median(large.p99_ms / small.p99_ms for small, large in rounds)
        figures += [
            Figure(f"ingest, {sizes}", ingest, "×", at_least=0.8 if limited else None),
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
                Figure(f"{prefix}: GET p50", one.p50_ms, "ms"),
                Figure(f"{prefix}: GET p99", one.p99_ms, "ms"),
            ]
    return figures


if __name__ == "__main__":
    main()
