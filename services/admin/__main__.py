"""``python -m services.admin``: the operator's command."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping

from orderlib import commands as library_commands
from orderlib.entry_point import EXIT_STATUSES
from services.admin import backfill, distribute, drift, export, offsets, orders, reconcile, rejects, topics
from services.kafka import REQUEST_TIMEOUT_S
from services.program import run_with_kafka, set_up_program

RunCommand = Callable[[argparse.Namespace, Mapping[str, str]], int]


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m services.admin",
        description="Set up and operate orderlib. A command that cannot reach a server fails after at most "
        f"{REQUEST_TIMEOUT_S:g} s.",
        epilog="topics, lag, offsets reset, offsets set-group and reconcile also need ORDERS_KAFKA_BOOTSTRAP_SERVERS "
        f"and ORDERS_TOPIC. {EXIT_STATUSES}",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (library_commands, distribute, topics, offsets, rejects, reconcile, drift, backfill, orders, export):
        module.add_commands(commands)
    return parser


def main(arguments: list[str], environ: Mapping[str, str]) -> int:
    """Run a command. Return the exit status."""
    options = make_parser().parse_args(arguments)
    command: RunCommand = options.command
    return command(options, environ)


if __name__ == "__main__":
    set_up_program(os.environ)
    # After Ctrl-C psycopg warns of its rollback, and prints its objects. The command itself says what went wrong.
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)
    run_with_kafka(lambda: main(sys.argv[1:], os.environ))
