"""Measure what each index, the foreign keys and the CHECKs cost PostgreSQL per order: ``python -m bench.parts``.

Each variant is a database without this part. The same rows are written to each in turns, by raw COPY in one transaction
for each 2,000 orders. A part costs the difference to the database that has everything. The benchmark starts the servers
that it uses.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from random import Random

import attrs
import psycopg
from psycopg.conninfo import make_conninfo

import orderlib
from bench.ingest import IngestBench, admin, utc_now
from bench.report import Figure, add_write_option, print_progress, publish
from bench.servers import benchmark_servers
from services.sender.generate import generate_order

ALL = "everything"

_DROP_CONSTRAINTS = """
SELECT format('ALTER TABLE %%s DROP CONSTRAINT %%I', conrelid::regclass, conname) FROM pg_constraint
WHERE contype::text = %s AND conrelid = ANY('{orders,delivery,payment,items}'::regclass[])
"""
#: For each part, a query for the statements that remove it.
PARTS: Mapping[str, tuple[str, str]] = {
    ALL: (_DROP_CONSTRAINTS, "no type"),
    "foreign keys": (_DROP_CONSTRAINTS, "f"),
    "CHECKs": (_DROP_CONSTRAINTS, "c"),
}
_INDEXES = """
SELECT i.indexrelid::regclass::text FROM pg_index i
WHERE i.indrelid = ANY('{orders,delivery,payment,items}'::regclass[]) AND NOT i.indisprimary ORDER BY 1
"""


def main() -> None:
    """Run the benchmark and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.parts", description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="orders in each run (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each variant (%(default)s)")
    add_write_option(parser)
    options = parser.parse_args()
    with benchmark_servers() as environ:
        figures = measure({**environ, "ORDERS_TOPIC": "orders"}, options)
    publish("parts", figures, write=options.write)


def measure(environ: Mapping[str, str], options: argparse.Namespace) -> list[Figure]:
    """Measure every variant in turns. The cost of a part is the median over the rounds."""
    for command in ("bootstrap", "migrate"):
        admin(environ, command)
    rng = Random(3)
    orders = [generate_order(rng, utc_now) for _ in range(options.count)]
    with orderlib.connect(environ["ORDERS_DATABASE_URL"]) as repository:
        for begin in range(0, len(orders), 2_000):
            repository.save_many(orders[begin : begin + 2_000])
    bench = IngestBench(environ=environ, superuser_url=environ["ORDERS_BOOTSTRAP_URL"], orders=orders)
    batches = bench.prebuild()
    bench.empty()
    variants = _create_variants(bench)
    us: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds):
        print_progress(f"round {number + 1} of {options.rounds}")
        for name, variant in variants.items():
            variant.empty()
            us[name].append(1e6 / variant.raw_copy(batches))
    return [
        Figure("raw COPY of an order", statistics.median(us[ALL]), "µs"),
        *(
            Figure(f"of that for {name}", statistics.median(a - b for a, b in zip(us[ALL], times, strict=True)), "µs")
            for name, times in us.items()
            if name != ALL
        ),
    ]


def _create_variants(bench: IngestBench) -> dict[str, IngestBench]:
    """Create a database without each part."""
    parts = dict(PARTS)
    with psycopg.connect(bench.superuser_url, autocommit=True) as connection:
        for (index,) in connection.execute(_INDEXES).fetchall():
            parts[f"index {index}"] = ("SELECT 'DROP INDEX ' || %s::text", index)
    variants = {}
    for number, (name, (query, parameter)) in enumerate(parts.items()):
        database = f"without_{number}"
        with psycopg.connect(bench.superuser_url, dbname="postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {database} TEMPLATE orders STRATEGY file_copy".encode())
        variant = attrs.evolve(
            bench,
            superuser_url=make_conninfo(bench.superuser_url, dbname=database),
            environ={
                **bench.environ,
                "ORDERS_DATABASE_URL": make_conninfo(bench.environ["ORDERS_DATABASE_URL"], dbname=database),
            },
        )
        with psycopg.connect(variant.superuser_url, autocommit=True) as connection:
            for (statement,) in connection.execute(query.encode(), [parameter]).fetchall():
                connection.execute(statement)
        variants[name] = variant
    return variants


if __name__ == "__main__":
    main()
