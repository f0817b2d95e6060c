"""Measure what a call costs on Citus, beside plain PostgreSQL: ``python -m bench.citus FOLDER``.

FOLDER is a PostgreSQL 18 with the extension Citus. The benchmark starts a coordinator with two workers, and a plain
server. It prints the CPU time of all processes of PostgreSQL for each call. Other load on the machine changes it
little.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import attrs
import psutil

import orderlib
from bench.ingest import utc_now
from orderlib import Order, PostgresOrderRepository
from orderlib.postgres.citus import distribute
from sandbox import PostgresServer
from services.sender.generate import generate_order
from tests.support.citus import SHARDS, Coordinator
from tests.support.databases import Database, of_database, on_server, role_passwords, set_up

ORDERS = 10_000

#: A call, by its name. It gets the repository, some orders that are stored, and a number.
CALLS: dict[str, Callable[[PostgresOrderRepository, list[Order], int], object]] = {
    "content_sha256": lambda r, orders, i: r.content_sha256(orders[i % 100].order_uid),
    "get": lambda r, orders, i: r.get(orders[i % 100].order_uid),
    "get_many, 20 orders": lambda r, orders, _: r.get_many([order.order_uid for order in orders[:20]]),
    "list_orders, 20 orders": lambda r, _, __: r.list_orders(limit=20),
    "find": lambda r, orders, i: r.find(orders[i % 100].track_number),
    "count": lambda r, _, __: r.count(),
    "stats": lambda r, _, __: r.stats(),
    "save": lambda r, orders, i: r.save(attrs.evolve(orders[i % 100], customer_id=f"customer {i}")),
    "save_many, 100 orders": lambda r, orders, i: r.save_many(
        [attrs.evolve(order, customer_id=f"customers {i}") for order in orders[:100]]
    ),
}


def main() -> None:
    """Start the servers, measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.citus", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--calls", type=int, default=100, help="calls of each kind (%(default)s)")
    options = parser.parse_args()
    with Coordinator(options.folder) as citus, PostgresServer() as plain:
        citus.add_database("bench")
        on_plain, on_citus = on_server(plain), of_database(on_server(citus).environ(), "bench")
        for database in (on_plain, on_citus):
            set_up(database)
        citus.set_passwords("bench", role_passwords(on_citus))
        distribute(on_citus.superuser_url, shards=SHARDS, application_name="bench")
        costs = _measure(on_plain, [plain], options.calls)
        costs_on_citus = _measure(on_citus, [citus, *citus.workers], options.calls)
    print("| call | plain | Citus | ratio |\n|---|---|---|---|")
    for call in CALLS:
        one, other = costs[call], costs_on_citus[call]
        print(f"| {call} | {one:.2f} ms | {other:.2f} ms | {other / one:.1f} |")


def _measure(database: Database, servers: Sequence[PostgresServer], calls: int) -> dict[str, float]:
    """Return the CPU milliseconds of each call."""
    processes = [psutil.Process(server.pid) for server in servers]
    rng = Random(1)
    orders = [generate_order(rng, utc_now) for _ in range(ORDERS)]
    costs = {}
    with orderlib.connect(database.writer_url, timeout_s=60) as repository:
        for start in range(0, ORDERS, 1_000):
            repository.save_many(orders[start : start + 1_000])
        for name, call in CALLS.items():
            for number in range(8):
                call(repository, orders, number)
            before = sum(map(_cpu_s, processes))
            for number in range(8, 8 + calls):
                call(repository, orders, number)
            costs[name] = (sum(map(_cpu_s, processes)) - before) / calls * 1000
    return costs


def _cpu_s(server: psutil.Process) -> float:
    """Return the CPU time of a server, of its running processes and of those that have ended."""
    own = server.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for process in server.children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system
    return float(total)


if __name__ == "__main__":
    main()
