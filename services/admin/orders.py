"""``get``, ``original`` and ``forget``: print or erase one order."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

import orderlib
from orderlib.errors import OrderNotFound
from orderlib.postgres.connections import connect
from orderlib.postgres.operations import forget
from services.admin.output import add_json_option, add_yes_option, confirm, count_of, print_result, printable
from services.admin.schema import APPLICATION_NAME, Commands
from services.program import EXIT_DONE, EXIT_FAILED
from services.settings import database_url


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    parser = commands.add_parser(
        "get",
        help="print an order",
        description="Print the current version of an order as canonical JSON (ORDERS_READER_URL). On a "
        "terminal, control characters are escaped.",
    )
    _add_order_uid(parser)
    parser.set_defaults(command=_get)
    parser = commands.add_parser(
        "original",
        help="print an order as it was sent",
        description="Print the JSON text of an order byte for byte as it was sent, without a line end of its own "
        "(ORDERS_READER_URL). Only an order with fields that orderlib does not know has one; exit status 1 if it has "
        "none. On a terminal, control characters are escaped.",
    )
    _add_order_uid(parser)
    parser.set_defaults(command=_original)
    parser = commands.add_parser(
        "forget",
        help="erase an order",
        description="Erase an order with its delivery, payment and items, and the rejects that have its order_uid as "
        "key (ORDERS_MIGRATOR_URL). Kafka still has the record until its retention ends: moving the offsets back "
        "stores the order again. Backups contain it, too.",
    )
    _add_order_uid(parser)
    add_yes_option(parser)
    add_json_option(parser)
    parser.set_defaults(command=_forget)


def _add_order_uid(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("order_uid", metavar="UID", help="an order_uid; write -- before one that begins with a hyphen")


def _get(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_READER_URL")
    with orderlib.connect(url, application_name=APPLICATION_NAME, max_connections=1) as repository:
        order = repository.get(options.order_uid)
    text = orderlib.encode_order(order) + b"\n"
    # Programs get the canonical bytes. A terminal would interpret control characters in them.
    sys.stdout.buffer.write(printable(text.decode()).encode() if sys.stdout.isatty() else text)
    return EXIT_DONE


def _original(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_READER_URL")
    with orderlib.connect(url, application_name=APPLICATION_NAME, max_connections=1) as repository:
        original = repository.original(options.order_uid)
    if original is None:
        print("error: this order has no unknown fields, so no original is kept: use `get`", file=sys.stderr)
        return EXIT_FAILED
    sys.stdout.buffer.write(printable(original.decode()).encode() if sys.stdout.isatty() else original)
    return EXIT_DONE


def _forget(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_MIGRATOR_URL")
    if not confirm(f"erase order {options.order_uid} permanently", yes=options.yes):
        return EXIT_FAILED
    with connect(url, application_name=APPLICATION_NAME) as connection:
        orders, rejects = forget(connection, options.order_uid)
    if not orders and not rejects:
        raise OrderNotFound(options.order_uid)
    erased = {"orders": orders, "rejects": rejects}
    sentence = (
        f"erased {count_of(orders, 'order')} and {count_of(rejects, 'reject')}; "
        "moving the offsets back would store them again"
    )
    print_result(sentence, erased, as_json=options.json)
    return EXIT_DONE
