"""``drift``: list the fields that producers send and orderlib does not know."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
import sys
from collections.abc import Iterable, Mapping

import attrs

from orderlib.codecs import unknown_fields
from orderlib.commands import APPLICATION_NAME, Commands
from orderlib.entry_point import EXIT_DONE
from orderlib.postgres.snapshot import snapshot
from services.admin.output import add_json_option, print_table
from services.settings import database_url

#: More different paths than this are counted, but not listed: a producer may use any text as a name.
_MAX_PATHS = 10_000
#: A name is cut after this number of characters.
_MAX_NAME = 100

_INDEX = re.compile(r"\[\d+\]")


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "drift",
        help="list the fields that producers send and orderlib does not know",
        description="List the path of each unknown field in the stored originals, with the number of orders that have "
        "it, and when the oldest and the newest of them were stored (ORDERS_READER_URL). Prints names, never values. "
        f"At most {_MAX_PATHS:,} paths are listed.",
    )
    add_json_option(parser)
    parser.set_defaults(command=_drift)


@attrs.define
class _Seen:
    orders: int
    oldest_stored_at: dt.datetime
    newest_stored_at: dt.datetime


def _drift(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    seen: dict[str, _Seen] = {}
    unlisted: int = 0
    with snapshot(database_url(environ, "ORDERS_READER_URL"), APPLICATION_NAME) as stored:
        for stored_at, value in stored.originals():
            unlisted += _add(seen, _paths(value), stored_at)
    rows = [{"path": path, **attrs.asdict(found)} for path, found in sorted(seen.items())]
    print_table(rows, as_json=options.json)
    if unlisted:
        print(f"… and {unlisted:,} more fields of other paths", file=sys.stderr)
    return EXIT_DONE


def _paths(value: bytes) -> set[str]:
    """Return the paths of the unknown fields of an original, the same for each element of an array."""
    return {
        f"{_INDEX.sub('[*]', path)}{_member(name)}" for path, names in unknown_fields(value).items() for name in names
    }


def _member(name: str) -> str:
    """Return a member of a JSON path. The name is a producer's text: cut it, and escape what is not a word."""
    name = name if len(name) <= _MAX_NAME else name[:_MAX_NAME] + "…"
    return f".{name}" if name.isascii() and name.isidentifier() else f"[{json.dumps(name)}]"


def _add(seen: dict[str, _Seen], paths: Iterable[str], stored_at: dt.datetime) -> int:
    """Count an order at these paths. Return how many of them are not listed."""
    unlisted = 0
    for path in paths:
        found = seen.get(path)
        if found is not None:
            found.orders += 1
            found.oldest_stored_at = min(found.oldest_stored_at, stored_at)
            found.newest_stored_at = max(found.newest_stored_at, stored_at)
        elif len(seen) < _MAX_PATHS:
            seen[path] = _Seen(orders=1, oldest_stored_at=stored_at, newest_stored_at=stored_at)
        else:
            unlisted += 1
    return unlisted
