"""Measure ingest and GET while the tables grow: ``python -m bench.growth``; ``make bench-growth`` runs this.

Each size is measured twice, with PostgreSQL's default settings and with settings for this machine's memory. The
order_uids are random. The benchmark starts its servers, and needs ``wrk`` on PATH and 2.5 KB of disk for each order.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import attrs
import psutil
import psycopg

import orderlib
from bench.api import VARIANTS, run_wrk, serving
from bench.ingest import TABLES, IngestBench, admin, produce, running, utc_now, wait
from bench.report import Figure, add_write_option, print_progress, publish
from bench.servers import benchmark_sandbox
from sandbox import Sandbox
from services.sender.generate import generate_order

#: How many orders the tables have at each measurement, without those that the measurements add: up to a tenth.
SIZES = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
#: The part of the orders that is added again before each measurement, in random order. Then most pages are in memory
#: and were written to the log since the last checkpoint, as those of a server that has run for a while.
WARM_UP = 0.05
#: Orders that the consumer stores before each measurement.
WARM_UP_ORDERS = 20_000
#: Orders that the consumer stores at each measurement.
NEW_ORDERS = 40_000
#: Orders that are read at random at each measurement.
READ_ORDERS = 100_000
#: The orders that all others are copies of, with other order_uids, track numbers and rids.
TEMPLATES = 2_000
CONNECTIONS = 16

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
class GrowthBench:
    """The servers, and the tables that grow."""

    sandbox: Sandbox
    environ: Mapping[str, str]
    folder: str
    rng: Random

    @property
    def _superuser_url(self) -> str:
        return self.environ["ORDERS_BOOTSTRAP_URL"]

    def add_templates(self) -> None:
        """Store the orders that the others are copies of."""
        with orderlib.connect(self.environ["ORDERS_DATABASE_URL"]) as repository:
            repository.save_many(generate_order(self.rng, utc_now) for _ in range(TEMPLATES))
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            for table in TABLES:
                connection.execute(f"CREATE TABLE template_{table} AS TABLE {table}".encode())

    def grow(self, begin: int, end: int) -> None:
        """Add copies of each template, with the numbers ``begin`` to ``end``."""
        # Sorted, each page of the primary key is changed once. It becomes as full as after random inserts.
        self._copy_all(begin, end, "ORDER BY 1")
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            connection.execute(f"VACUUM ANALYZE {', '.join(TABLES)}".encode())

    def warm_up(self, begin: int, end: int) -> None:
        """Add copies of each template as new orders arrive, each on other pages than the one before."""
        self._copy_all(begin, end, "")

    def _copy_all(self, begin: int, end: int, order_by: str) -> None:
        with ThreadPoolExecutor(len(TABLES)) as threads:
            list(threads.map(lambda table: self._copy(table, begin, end, order_by), TABLES))

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

    def orders_per_s(self) -> float:
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

    def get_ms(self, copies: int, seconds: int) -> tuple[float, float]:
        """Return p50 and p99 of GET in ms, for random orders among this number of copies of each template."""
        # Not while the disk is busy with what was stored before.
        os.sync()
        with serving(self.environ, VARIANTS[0]) as (port, process):
            result = run_wrk(port, process, self._requests(copies), CONNECTIONS, seconds)
        return result.p50_ms, result.p99_ms

    def _requests(self, copies: int) -> str:
        """Return a Lua script that requests random orders. A file has their order_uids."""
        with psycopg.connect(self._superuser_url, autocommit=True) as connection:
            templates = [uid for (uid,) in connection.execute("SELECT order_uid FROM template_orders")]
        chosen = (f"{self.rng.choice(templates)}{self.rng.randrange(copies)}" for _ in range(READ_ORDERS))
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


@attrs.frozen(kw_only=True)
class Measurement:
    """What was measured at one size with the same settings."""

    orders_per_s: float
    p50_ms: float
    p99_ms: float


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument("--orders", type=int, default=SIZES[-1], help="the largest size (%(default)s)")
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
    for command in ("bootstrap", "migrate"):
        admin(bench.environ, command)
    bench.add_templates()
    measured: dict[str, dict[int, Measurement]] = {name: {} for name in SETTINGS}
    sizes: list[Figure] = []
    copies = 0
    for size in [size for size in SIZES if size <= options.orders]:
        print_progress(f"growing to {size:,} orders")
        # The restart with the last of the settings is still in effect; the first size has few pages.
        bench.grow(copies, size // TEMPLATES)
        copies = size // TEMPLATES
        tables_mb, indexes_mb = bench.sizes_mb()
        sizes += [
            Figure(f"{size:,} orders: tables", tables_mb, "MB"),
            Figure(f"{size:,} orders: indexes", indexes_mb, "MB"),
        ]
        for name, settings in SETTINGS.items():
            bench.use(settings)
            begin, copies = copies, copies + math.ceil(copies * WARM_UP)
            bench.warm_up(begin, copies)
            orders_per_s = bench.orders_per_s()
            p50_ms, p99_ms = bench.get_ms(copies, options.seconds)
            measured[name][size] = Measurement(orders_per_s=orders_per_s, p50_ms=p50_ms, p99_ms=p99_ms)
            print_progress(f"{size:,} orders, {name}: {orders_per_s:,.0f}/s, GET {p50_ms:.1f} and {p99_ms:.1f} ms")
    return [*_ratios(measured), *_details(measured), *sizes]


def _ratios(measured: Mapping[str, Mapping[int, Measurement]]) -> list[Figure]:
    """Return the values at the largest size divided by those at the smallest."""
    figures = []
    for name, by_size in measured.items():
        limited = bool(SETTINGS[name])
        first, last = by_size[min(by_size)], by_size[max(by_size)]
        sizes = f"{max(by_size):,} / {min(by_size):,} orders, {name}"
        figures += [
            Figure(f"ingest, {sizes}", last.orders_per_s / first.orders_per_s, "×", at_least=0.8 if limited else None),
            Figure(f"GET p50, {sizes}", last.p50_ms / first.p50_ms, "×"),
            Figure(f"GET p99, {sizes}", last.p99_ms / first.p99_ms, "×", at_most=1.5 if limited else None),
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
