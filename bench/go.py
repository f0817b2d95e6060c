"""Measure ingest and GET beside the Go way: ``python -m bench.go``.

The Go way is the service in ``bench/go_way``: kafka-go, one transaction per order with one INSERT per row, and four
SELECTs per read. Each round measures both, reads in turns, on servers that the benchmark starts. It needs ``go`` and
``wrk`` on PATH; Go's modules come from the module proxy.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random

import attrs
import psutil
import psycopg
from psycopg.conninfo import make_conninfo

import orderlib
from bench.api import REQUESTS, UNCACHED, VARIANTS, WrkResult, listening, measure_in_turns, prepare, serving
from bench.ingest import IngestBench, admin, produce, utc_now, wait
from bench.report import Figure, add_write_option, print_progress, publish
from bench.servers import benchmark_servers
from orderlib.postgres.rows import DELIVERY_COLUMNS, ITEM_COLUMNS, ORDER_COLUMNS, PAYMENT_COLUMNS
from sandbox.server import free_port
from services.sender.generate import generate_order

GET_OF_GO = "GET, the Go way"
SOURCE = Path(__file__).parent / "go_way"
CONNECTIONS = (16, 64)
#: How long the Go way consumes in each round.
CONSUME_S = 5
#: The columns that both have, by table.
COLUMNS = {
    "orders": ORDER_COLUMNS,
    "delivery": ("order_uid", *DELIVERY_COLUMNS),
    "payment": ("order_uid", *PAYMENT_COLUMNS),
    "items": ("order_uid", *ITEM_COLUMNS),
}


@attrs.frozen(kw_only=True)
class GoWay:
    """The built program, and the servers that it uses."""

    program: Path
    environ: Mapping[str, str]
    superuser_url: str

    @classmethod
    def build(cls, environ: Mapping[str, str], folder: Path) -> GoWay:
        """Build the program into a folder, and create its tables."""
        program = folder / "go_way"
        subprocess.run(["go", "build", "-o", program, "."], cwd=SOURCE, check=True)
        url, password = environ["ORDERS_BOOTSTRAP_URL"], secrets.token_hex(16)
        with psycopg.connect(url, autocommit=True) as connection:
            # Its driver refuses the sandbox's single iteration.
            connection.execute("SET scram_iterations = 4096")
            connection.execute(f"CREATE ROLE go_way LOGIN PASSWORD '{password}'".encode())
            connection.execute("CREATE SCHEMA go_way AUTHORIZATION go_way")
        settings = {
            "GO_WAY_DATABASE_URL": make_conninfo(url, user="go_way", password=password, sslmode="disable"),
            "GO_WAY_BROKERS": environ["ORDERS_KAFKA_BOOTSTRAP_SERVERS"],
            "GO_WAY_TOPIC": environ["ORDERS_TOPIC"],
        }
        subprocess.run([program, "migrate"], env={**os.environ, **settings}, check=True)
        return cls(program=program, environ={**os.environ, **settings}, superuser_url=url)

    def copy_orders(self) -> None:
        """Store the orders that orderlib has stored."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            for table, names in COLUMNS.items():
                columns = ", ".join(names)
                rows = f"SELECT {columns} FROM {table}" + " ORDER BY order_uid, line" * (table == "items")
                connection.execute(f"INSERT INTO go_way.{table} ({columns}) {rows}".encode())
            connection.execute("VACUUM ANALYZE")

    def empty(self) -> None:
        """Delete all orders."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            connection.execute("TRUNCATE go_way.orders, go_way.delivery, go_way.payment, go_way.items")
            connection.execute("CHECKPOINT")

    def stored(self) -> int:
        """Return how many orders are stored."""
        with psycopg.connect(self.superuser_url, autocommit=True) as connection:
            [[count]] = connection.execute("SELECT count(*) FROM go_way.orders").fetchall()
            return int(count)

    def consume(self, group: str) -> float:
        """Consume the topic from its beginning for ``CONSUME_S``. Return orders per second."""
        process = subprocess.Popen([self.program, "consume"], env={**self.environ, "GO_WAY_GROUP": group})
        try:
            wait(lambda: self.stored() > 0, 60)
            began_s, first = time.monotonic(), self.stored()
            time.sleep(CONSUME_S)
            return (self.stored() - first) / (time.monotonic() - began_s)
        finally:
            process.terminate()
            process.wait(20)

    @contextmanager
    def serving(self) -> Iterator[tuple[int, psutil.Process]]:
        """Serve orders, and yield the port and the process."""
        port = free_port()
        environ = {**self.environ, "GO_WAY_BIND": f"127.0.0.1:{port}"}
        with listening(port, [str(self.program), "serve"], environ) as process:
            yield port, process


def reads(go_way: GoWay, environ: Mapping[str, str], options: argparse.Namespace) -> Iterator[Figure]:
    """Measure GET of both: orderlib's with a worker for each core, because Go uses all cores, too."""
    environ = {**environ, "WEB_CONCURRENCY": str(os.cpu_count())}
    [variant] = [variant for variant in VARIANTS if variant.name == UNCACHED]
    results: dict[tuple[str, int], list[WrkResult]] = {}
    for _ in range(options.rounds):
        requests = REQUESTS[variant.requests]
        servers = [("GET", requests, serving(environ, variant)), (GET_OF_GO, requests, go_way.serving())]
        measure_in_turns(servers, CONNECTIONS, options.turns, options.seconds, results)
    for connections in CONNECTIONS:
        pairs = zip(results["GET", connections], results[GET_OF_GO, connections], strict=True)
        ratio = statistics.median(orderlib_run.per_s / go_run.per_s for orderlib_run, go_run in pairs)
        yield Figure(f"GET / the Go way, {connections} connections", ratio, "×", at_least=3.5, goal=5)
    for (name, connections), turns in results.items():
        yield Figure(f"{name}, {connections} connections", statistics.median(each.per_s for each in turns), "/s")
        yield Figure(f"{name}, {connections} connections, p99", statistics.median(each.p99_ms for each in turns), "ms")


def ingest(go_way: GoWay, bench: IngestBench, rounds: int) -> Iterator[Figure]:
    """Measure the consumers of both."""
    per_s: list[float] = []
    per_s_of_go: list[float] = []
    for number in range(rounds):
        print_progress(f"ingest beside the Go way, round {number + 1} of {rounds}")
        bench.empty()
        per_s.append(bench.consume())
        go_way.empty()
        per_s_of_go.append(go_way.consume(f"go-way-{number}"))
    ratio = statistics.median(a / b for a, b in zip(per_s, per_s_of_go, strict=True))
    yield Figure("ingest / the Go way", ratio, "×", at_least=20)
    yield Figure("ingest", statistics.median(per_s), "orders/s")
    yield Figure("ingest, the Go way", statistics.median(per_s_of_go), "orders/s")


def measure(environ: Mapping[str, str], options: argparse.Namespace, folder: Path) -> list[Figure]:
    """Run every measurement on the servers of this environment."""
    prepare(environ)
    admin(environ, "topics")
    rng = Random(1)
    orders = [generate_order(rng, utc_now) for _ in range(options.count)]
    produce(environ, ((order.order_uid, orderlib.encode_order(order)) for order in orders))
    bench = IngestBench(environ=environ, superuser_url=environ["ORDERS_BOOTSTRAP_URL"], orders=orders)
    go_way = GoWay.build(environ, folder)
    go_way.copy_orders()
    return [*reads(go_way, environ, options), *ingest(go_way, bench, options.rounds)]


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.go", description=__doc__)
    parser.add_argument("--count", type=int, default=50_000, help="orders in the topic (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement (%(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="measurements of GET in a round (%(default)s)")
    parser.add_argument("--seconds", type=int, default=1, help="duration of each measurement of GET (%(default)s)")
    add_write_option(parser)
    options = parser.parse_args()
    if missing := [name for name in ("go", "wrk") if shutil.which(name) is None]:
        print(f"bench: the comparison with the Go way is left out: no {' and no '.join(missing)} on PATH")
        return
    with benchmark_servers() as environ, tempfile.TemporaryDirectory() as folder:
        figures = measure(
            {**environ, "ORDERS_TOPIC": "orders", "ORDERS_METRICS_BIND": "127.0.0.1:0"}, options, Path(folder)
        )
    publish("go", figures, write=options.write)


if __name__ == "__main__":
    main()
