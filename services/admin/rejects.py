"""``rejects list | summary | show | redrive | purge``: rejected records."""

from __future__ import annotations

import argparse
import base64
import codecs
import datetime as dt
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial

from orderlib.commands import APPLICATION_NAME, Commands
from orderlib.entry_point import EXIT_DONE, EXIT_FAILED
from orderlib.errors import REJECT_CODES, RejectNotFound
from orderlib.postgres.connections import open_connection
from orderlib.postgres.operations import count_old_rejects, count_rejects_at, purge_old_rejects, purge_rejects_at
from orderlib.postgres.reject_list import RejectPosition, RejectQuery
from orderlib.postgres.rejects import Prefix, count_rejects_by_path, get_rejects, list_rejects, redrive
from orderlib.repository import Outcome, is_position
from services.admin.database import open_database
from services.admin.output import (
    ProgressLine,
    add_json_option,
    add_yes_option,
    confirm,
    count_of,
    positive_integer,
    print_result,
    print_table,
    printable,
    rfc3339_time,
)
from services.settings import database_url, max_record_bytes, tombstones

#: ``rejects show`` prints at most this part of a key, a value or the headers.
SHOWN_BYTES = 8 * 1024 * 1024


def add_commands(commands: Commands) -> None:
    """Add these commands to the parser."""
    parser = commands.add_parser(
        "rejects",
        help="list, count, show, redrive or purge rejected records",
        description="Records that the consumer rejected. Each is stored unchanged with its code and faults. POSITION "
        "is TOPIC/PARTITION/OFFSET.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    listing = actions.add_parser("list", help="list rejects, newest first (ORDERS_DATABASE_URL)")
    listing.add_argument("--oldest", action="store_true", help="list the oldest rejects first")
    listing.add_argument(
        "--since", metavar="TIME", type=rfc3339_time, help="only records rejected at this RFC 3339 time or later"
    )
    listing.add_argument("--code", choices=REJECT_CODES, help="only rejects with this code")
    listing.add_argument("--key", metavar="TEXT", help="only rejects of records with this key, usually an order_uid")
    listing.add_argument(
        "--without-order-uid",
        action="store_true",
        help="only rejects of records without a key, or with a key that is no order_uid: `forget` cannot find them",
    )
    listing.add_argument("--not-redriven", action="store_true", help="only rejects that were never redriven")
    _add_open_option(listing)
    listing.add_argument(
        "--limit", metavar="N", type=positive_integer, default=50, help="how many rejects to list at most (%(default)s)"
    )
    add_json_option(listing)
    listing.set_defaults(command=_list)

    summary = actions.add_parser(
        "summary",
        help="count rejects by code and first fault (ORDERS_READER_URL)",
        description="Print the number of rejects by code and path of the first fault, the most frequent first. Prints "
        "paths, never values; all elements of an array have one path.",
    )
    _add_open_option(summary)
    add_json_option(summary)
    summary.set_defaults(command=_summary)

    showing = actions.add_parser(
        "show",
        help="print one complete reject (ORDERS_DATABASE_URL)",
        description="Print everything stored of a reject as JSON. Key and value are text if they are UTF-8, otherwise "
        f"base64. Control characters are escaped. If a key, a value or headers are larger than {SHOWN_BYTES >> 20} "
        "MiB, print the beginning and the size.",
    )
    showing.add_argument("position", metavar="POSITION", type=_position)
    showing.set_defaults(command=_show)

    redriving = actions.add_parser(
        "redrive",
        help="process rejects again, at their own positions (ORDERS_DATABASE_URL)",
        description="Process rejects again by the rules of this release, each at its own position. A valid order is "
        "stored if the database does not have it, or has a version from a lower offset of the same partition. "
        "Other outcomes: duplicate, superseded, forgotten, or rejected again. With ORDERS_TOMBSTONES=erase, a "
        "tombstone erases its order in the same way. The reject stays, with its outcome. A later redrive skips it, "
        "unless it was rejected again.",
    )
    which = redriving.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="redrive all rejects")
    which.add_argument("--code", choices=REJECT_CODES, help="redrive the rejects with this code")
    which.add_argument("position", metavar="POSITION", nargs="?", type=_position, help="redrive one reject")
    add_json_option(redriving)
    redriving.set_defaults(command=_redrive)

    purging = actions.add_parser(
        "purge",
        help="delete one reject, or old ones, permanently (ORDERS_MIGRATOR_URL)",
        description="Delete the reject at POSITION, or the rejects that are older than AGE, whether they were redriven "
        "or not. They are stored again only if the offsets are moved back. While Kafka still has its record, a purged "
        "reject that no redrive has solved is a discrepancy of `reconcile`.",
    )
    which = purging.add_mutually_exclusive_group(required=True)
    which.add_argument("--older-than", metavar="AGE", type=_age, help="such as 90d, 12h or 30m")
    which.add_argument(
        "position",
        metavar="POSITION",
        nargs="?",
        type=_position,
        help="delete one reject; after the topic was recreated, this may be one for each topic id, as `show` prints",
    )
    add_yes_option(purging)
    add_json_option(purging)
    purging.set_defaults(command=_purge)


def _add_open_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--open",
        action="store_true",
        help="only rejects that were never redriven or were rejected again: those that `redrive` takes",
    )


def _position(text: str) -> RejectPosition:
    found = re.fullmatch(r"(?P<topic>[^/]+)/(?P<partition>[0-9]{1,10})/(?P<offset>[0-9]{1,19})", text)
    if not found or not is_position(found["topic"], int(found["partition"]), int(found["offset"])):
        raise argparse.ArgumentTypeError("must be TOPIC/PARTITION/OFFSET")
    return RejectPosition(topic=found["topic"], partition=int(found["partition"]), offset=int(found["offset"]))


def _age(text: str) -> dt.timedelta:
    found = re.fullmatch(r"(\d{1,6})([mhd])", text)
    if not found:
        raise argparse.ArgumentTypeError("must be a number of minutes (m), hours (h) or days (d), such as 90d")
    unit = {"m": "minutes", "h": "hours", "d": "days"}[found[2]]
    return dt.timedelta(**{unit: int(found[1])})


def _list(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    query = RejectQuery(
        code=options.code,
        # Bytes on the command line that are not UTF-8 stay those bytes.
        key=None if options.key is None else os.fsencode(options.key),
        without_order_uid=options.without_order_uid,
        since=options.since,
        not_redriven=options.not_redriven,
        is_open=options.open,
        oldest_first=options.oldest,
        limit=options.limit,
    )
    with open_database(environ, "ORDERS_DATABASE_URL") as connection:
        page, total = list_rejects(connection, query)
    rows = [
        {
            "position": str(reject.position),
            "code": reject.code,
            "faults": reject.total_faults,
            "first_path": reject.faults[0].path if reject.faults else None,
            "record_time": reject.record_time,
            "rejected_at": reject.rejected_at,
            "redriven_at": reject.redriven_at,
            "redrive_outcome": reject.redrive_outcome,
        }
        for reject in page.rejects
    ]
    print_table(rows, as_json=options.json)
    if not options.json:
        print(f"{len(rows):,} of {count_of(total, 'reject')}")
    return EXIT_DONE


def _summary(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_database(environ, "ORDERS_READER_URL") as connection:
        counts = count_rejects_by_path(connection, RejectQuery(is_open=options.open))
    rows = [{"rejects": number, "code": code, "first_path": path} for number, code, path in counts]
    print_table(rows, as_json=options.json)
    return EXIT_DONE


def _show(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_database(environ, "ORDERS_DATABASE_URL") as connection:
        for reject in get_rejects(connection, options.position, SHOWN_BYTES):
            headers = reject["headers"]
            plain = {
                **reject,
                "key": _prefix_to_plain(reject["key"]),
                "value": _prefix_to_plain(reject["value"]),
                "headers": json.loads(headers.content)
                if headers and headers.is_complete
                else _prefix_to_plain(headers),
            }
            print(printable(json.dumps(plain, indent=2, ensure_ascii=False, default=lambda value: value.isoformat())))
    return EXIT_DONE


def _prefix_to_plain(part: Prefix | None) -> dict[str, object] | None:
    if part is None:
        return None
    size = {} if part.is_complete else {"shown_bytes": len(part.content), "size_bytes": part.size_bytes}
    try:
        # The prefix may end within a character.
        return {"text": codecs.getincrementaldecoder("utf-8")().decode(part.content, final=part.is_complete), **size}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(part.content).decode(), **size}


def _redrive(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    max_bytes = max_record_bytes(environ)
    outcomes: Counter[Outcome] = Counter()
    is_complete = False
    try:
        with open_database(environ, "ORDERS_DATABASE_URL") as connection, ProgressLine("rejects redriven") as progress:
            if options.position is not None:
                # Raise RejectNotFound if there is none: ``redrive`` would do nothing.
                list(get_rejects(connection, options.position, max_bytes=0))
            for batch in redrive(
                connection, max_bytes, code=options.code, position=options.position, tombstones=tombstones(environ)
            ):
                outcomes += batch
                progress.at(outcomes.total())
        is_complete = True
    finally:
        # After an error or Ctrl-C: what is done stays done.
        if is_complete or outcomes:
            print_table([{str(outcome): outcomes[outcome] for outcome in Outcome}], as_json=options.json)
        if outcomes and not is_complete:
            print("not complete: run it again to continue", file=sys.stderr)
    return EXIT_DONE


def _purge(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_connection(database_url(environ, "ORDERS_MIGRATOR_URL"), application_name=APPLICATION_NAME) as connection:
        if options.position is None:
            count, where = count_old_rejects(connection, options.older_than), ""
            purge = partial(purge_old_rejects, connection, options.older_than)
        else:
            count, where = count_rejects_at(connection, options.position), f" at {options.position}"
            purge = partial(purge_rejects_at, connection, options.position)
            if not count:
                raise RejectNotFound(str(options.position))
        if count and not confirm(f"delete {count_of(count, 'reject')}{where} permanently", yes=options.yes):
            return EXIT_FAILED
        deleted = purge()
    print_result(f"deleted {count_of(deleted, 'reject')}", {"rejects": deleted}, as_json=options.json)
    return EXIT_DONE
