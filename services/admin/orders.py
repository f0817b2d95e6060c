"""``get``, ``original``, ``state``, ``forget`` and ``forgotten``: print or erase orders."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import attrs

import orderlib
from orderlib.codecs import is_order_uid
from orderlib.commands import APPLICATION_NAME, Commands
from orderlib.contract import describe, field_rules
from orderlib.entry_point import EXIT_DONE, EXIT_FAILED
from orderlib.errors import ConfigurationError
from orderlib.models import Order
from orderlib.postgres.connections import Connection, open_connection
from orderlib.postgres.operations import (
    Forgotten,
    count_unchecked_rejects,
    forget,
    forget_again,
    forget_customer,
    forgotten,
)
from orderlib.postgres.snapshot import snapshot
from services.admin.database import open_database, warn_of_superuser
from services.admin.output import (
    add_json_option,
    add_yes_option,
    confirm,
    count_of,
    print_bytes,
    print_result,
    printable,
    utc_text,
    utf8_text,
)
from services.settings import database_url

#: ``state`` lists at most this number of rejects.
_SHOWN_REJECTS = 100


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
        "state",
        help="say what became of an order",
        description="Say whether the order is stored, was erased by a tombstone or was forgotten, and list the rejects "
        f"that have its order_uid as key, at most {_SHOWN_REJECTS} (ORDERS_READER_URL). Prints positions, times and "
        "codes, never values of the order. Exit status 1 if nothing is known of it.",
    )
    _add_order_uid(parser)
    parser.set_defaults(command=_state)
    parser = commands.add_parser(
        "forget",
        help="erase an order permanently",
        description="Erase an order with its delivery, payment, items and original, and the rejects that have its "
        "order_uid as key (ORDERS_MIGRATOR_URL). The SHA-256 of the order_uid is kept: later records and writes of "
        "that order have the outcome forgotten and store nothing. Kafka and backups still contain the order. Rejects "
        "whose key is no order_uid cannot be checked; it says how many there are.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    _add_order_uid(which, nargs="?", parse=_valid_order_uid)
    which.add_argument("--customer", metavar="ID", type=_customer_id, help="all stored orders of a customer")
    which.add_argument("--again", metavar="FILE", type=Path, help="all orders in a list that `forgotten` wrote")
    add_yes_option(parser)
    add_json_option(parser)
    parser.set_defaults(command=_forget)
    parser = commands.add_parser(
        "forgotten",
        help="list the forgotten orders as digests",
        description="Print the SHA-256 of each forgotten order_uid, one per line (ORDERS_READER_URL). After a restore, "
        "`forget --again` applies that list.",
    )
    parser.set_defaults(command=_forgotten)


def _add_order_uid(
    parser: argparse._ActionsContainer, *, nargs: str | None = None, parse: Callable[[str], str] = utf8_text
) -> None:
    parser.add_argument(
        "order_uid",
        metavar="UID",
        nargs=nargs,
        type=parse,
        help="an order_uid; write -- before one that begins with a hyphen",
    )


def _valid_order_uid(text: str) -> str:
    """Return an argument that an order may have as its order_uid."""
    if not is_order_uid(utf8_text(text)):
        raise argparse.ArgumentTypeError(f"must be an order_uid: {describe(field_rules(Order)['order_uid'])}")
    return text


def _customer_id(text: str) -> str:
    """Return an argument that is not empty, as that of an unset variable is."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return utf8_text(text)


def _get(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_READER_URL")
    with orderlib.connect(url, application_name=APPLICATION_NAME, max_connections=1) as repository:
        order = repository.get(options.order_uid)
    print_bytes(orderlib.encode_order(order) + b"\n")
    return EXIT_DONE


def _original(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_READER_URL")
    with orderlib.connect(url, application_name=APPLICATION_NAME, max_connections=1) as repository:
        original = repository.original(options.order_uid)
    if original is None:
        print("error: this order has no unknown fields, so no original is kept: use `get`", file=sys.stderr)
        return EXIT_FAILED
    print_bytes(original)
    return EXIT_DONE


def _state(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with snapshot(database_url(environ, "ORDERS_READER_URL"), APPLICATION_NAME) as stored:
        state = stored.state_of(options.order_uid, _SHOWN_REJECTS)
        topics = {offset.topic_id: offset.topic for offset in stored.offsets()}
    if state.stored_at is not None:
        print(f"stored: version {state.version}, at {utc_text(state.stored_at)}")
    if state.tombstone is not None and state.erased_at is not None:
        topic = topics.get(state.tombstone.topic_id, state.tombstone.topic_id)
        position = f"{topic}/{state.tombstone.partition}/{state.tombstone.offset}"
        print(printable(f"erased by the tombstone {position}, at {utc_text(state.erased_at)}"))
    if state.forgotten_at is not None:
        print(f"forgotten at {utc_text(state.forgotten_at)}: no later record stores it again")
    if state.rejects:
        print(f"{count_of(state.total_rejects, 'reject')} with this key:")
        for reject_position, code, outcome in state.rejects:
            print(printable(f"  {reject_position}  {code}{f', redriven: {outcome}' if outcome else ''}"))
        if unlisted := state.total_rejects - len(state.rejects):
            print(f"  … and {unlisted:,} more")
    if not state.is_known:
        print("nothing is known of this order_uid")
        return EXIT_FAILED
    return EXIT_DONE


def _forget(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_MIGRATOR_URL")
    call: Callable[[Connection], Forgotten]
    if options.again is not None:
        digests = _read_digests(options.again)
        what, call = f"the {count_of(len(digests), 'order')} in {options.again}", partial(forget_again, digests=digests)
    elif options.customer is not None:
        what = f"all orders of customer {options.customer}"
        call = partial(forget_customer, customer_id=options.customer)
    else:
        what, call = f"order {options.order_uid}", partial(forget, order_uid=options.order_uid)
    if not confirm(f"erase {what} permanently", yes=options.yes):
        return EXIT_FAILED
    with open_connection(url, application_name=APPLICATION_NAME) as connection:
        warn_of_superuser(connection, "ORDERS_MIGRATOR_URL")
        # First: an error after the commit of `forget` would seem to be one of `forget`.
        unchecked = count_unchecked_rejects(connection)
        done = call(connection)
    sentence = (
        f"erased {count_of(done.orders, 'order')} and {count_of(done.rejects, 'reject')}; "
        f"forgot {count_of(done.order_uids, 'order_uid')}: no later record stores them again"
    )
    print_result(sentence, {**attrs.asdict(done), "unchecked_rejects": unchecked}, as_json=options.json)
    if unchecked:
        print(
            f"not checked: {count_of(unchecked, 'reject')} without an order_uid as key. List them with `rejects list "
            "--without-order-uid`, read them with `rejects show`, and delete those of the person with `rejects purge "
            "POSITION`",
            file=sys.stderr,
        )
    return EXIT_DONE


def _read_digests(path: Path) -> list[bytes]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} is not a list that `forgotten` wrote") from exc
    except OSError as exc:
        raise ConfigurationError(f"{path}: {exc.strerror}") from exc
    for number, line in enumerate(lines, start=1):
        if not re.fullmatch("[0-9a-f]{64}", line):
            raise ConfigurationError(f"{path}: line {number} is not a SHA-256 in hexadecimal")
    return [bytes.fromhex(line) for line in lines]


def _forgotten(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_database(environ, "ORDERS_READER_URL") as connection:
        for digest in forgotten(connection):
            print(digest.hex())
    return EXIT_DONE
