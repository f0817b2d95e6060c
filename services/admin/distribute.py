"""``distribute``: distribute the tables of orders over the workers of Citus."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from orderlib.commands import APPLICATION_NAME, Commands
from orderlib.entry_point import EXIT_DONE
from orderlib.postgres.citus import distribute
from services.admin.output import positive_integer
from services.settings import database_url

#: Few, because every batch of the consumer is split over all shards.
_SHARDS = 8


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "distribute",
        help="distribute the tables over the workers of Citus",
        description="Distribute the tables of orders by order_uid, with the rows that they have. Needs a superuser of "
        "the coordinator (ORDERS_BOOTSTRAP_URL). Run it after `migrate`, with all other programs stopped. Tables that "
        "are distributed already stay as they are.",
    )
    parser.add_argument(
        "--shards",
        metavar="N",
        type=positive_integer,
        default=_SHARDS,
        help="number of shards, a small multiple of the number of workers (%(default)s)",
    )
    parser.set_defaults(command=_distribute)


def _distribute(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    distribute(
        database_url(environ, "ORDERS_BOOTSTRAP_URL"),
        shards=options.shards,
        application_name=APPLICATION_NAME,
        on_message=lambda table: print(f"distributed {table}", flush=True),
    )
    print("all tables of orders are distributed")
    return EXIT_DONE
