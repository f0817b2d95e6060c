"""``export``: all orders as JSON lines."""

from __future__ import annotations

import argparse
import datetime as dt
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import orderlib
from orderlib.commands import APPLICATION_NAME, Commands
from orderlib.entry_point import EXIT_DONE, EXIT_FAILED, StopEvent
from orderlib.postgres.snapshot import Snapshot, snapshot
from orderlib.repository import Filters, StoredOrder
from services.admin.output import ProgressLine, count_of, print_bytes, rfc3339_time, utf8_text
from services.settings import database_url

_BREAKS_TO_SPACES = bytes.maketrans(b"\r\n", b"  ")


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "export",
        help="print all orders as JSON lines",
        description="Print the current version of every order from one snapshot, as canonical JSON, one order per "
        "line, newest first (ORDERS_READER_URL). For an order with fields that orderlib does not know, print the "
        "original, with spaces in place of line breaks. `sender --file` sends the lines again. `tac` reverses them, so "
        "that the oldest order is sent first. Memory does not depend on the number of orders. On a terminal, control "
        "characters are escaped.",
        epilog="On Ctrl-C or SIGTERM it ends after a complete line, with exit status 1. A second signal ends it "
        "immediately.",
    )
    parser.add_argument(
        "--since",
        metavar="TIME",
        type=rfc3339_time,
        help="only orders whose current version was stored at this RFC 3339 time or later: new and changed ones. "
        "Give a time a few minutes before the start of the previous export, because stored_at is set before "
        "COMMIT. Every order is still read",
    )
    parser.add_argument("--customer", metavar="ID", type=utf8_text, help="only orders with exactly this customer_id")
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    url = database_url(environ, "ORDERS_READER_URL")
    # On a terminal the lines themselves show the progress.
    progress_line = ProgressLine("orders", shown=not sys.stdout.isatty())
    with snapshot(url, APPLICATION_NAME) as stored_orders, _stop_on_signal() as stop_event, progress_line as progress:
        exported = 0
        for stored in _select_orders(stored_orders, options.customer, options.since):
            if stop_event.is_set():
                break
            print_bytes(_line(stored_orders, stored) + b"\n")
            exported += 1
            progress.at(exported)
        sys.stdout.flush()
    if stop_event.is_set():
        print(f"error: interrupted: the export has only {count_of(exported, 'order')}", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_DONE


def _select_orders(
    stored_orders: Snapshot, customer_id: str | None, since: dt.datetime | None
) -> Iterator[StoredOrder]:
    filters: Filters = {"customer_id": customer_id}
    # An old order may have changed lately, and no index knows when: read them all.
    return (stored for stored in stored_orders.stream(**filters) if since is None or stored.stored_at >= since)


def _line(stored_orders: Snapshot, stored: StoredOrder) -> bytes:
    """Return an order as one line of JSON, with all fields that were sent."""
    if not stored.has_original:
        return orderlib.encode_order(stored.order)
    # Only between the parts of a JSON text are line breaks allowed, so the content stays equal.
    return stored_orders.original(stored.order.order_uid).translate(_BREAKS_TO_SPACES)


@contextmanager
def _stop_on_signal() -> Iterator[StopEvent]:
    """Set an event at the first SIGINT or SIGTERM. A second one has its default effect, also while a write blocks."""
    event = StopEvent()

    def stop(number: int, _frame: object) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
