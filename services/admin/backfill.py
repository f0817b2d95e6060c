"""``backfill``: give the stored orders the fields that this release knows and an earlier one did not."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping

from orderlib.commands import Commands
from orderlib.entry_point import EXIT_DONE, EXIT_FAILED
from orderlib.errors import RejectedError
from orderlib.postgres.backfill import backfill
from orderlib.repository import Outcome
from services.admin.database import open_database
from services.admin.output import ProgressLine, add_json_option, count_of, print_json, print_table, printable, utf8_text

#: More rejected originals than this are counted, but not listed.
_MAX_LISTED = 10_000


def add_commands(commands: Commands) -> None:
    """Add this command to the parser."""
    parser = commands.add_parser(
        "backfill",
        help="decode the stored originals again, after an upgrade that knows more fields",
        description="Decode every stored original again by the rules of this release (ORDERS_DATABASE_URL). An order "
        "whose original has fields that an earlier release did not know becomes a new version with these fields, from "
        "the same record (stored). Other orders stay as they are (duplicate). If an original is not valid by the rules "
        "of this release, its order is named and stays as it is (rejected). Run it when no program of the earlier "
        "release is left. The consumer may run meanwhile.",
        epilog="Exit status 1 if an original is not valid. It works in small transactions: it can be stopped at any "
        "time, and running it twice is safe.",
    )
    parser.add_argument(
        "--after",
        metavar="UID",
        type=utf8_text,
        default="",
        help="continue after this order_uid, which an interrupted run prints",
    )
    parser.add_argument("--dry-run", action="store_true", help="count what would be stored, and store nothing")
    add_json_option(parser)
    parser.set_defaults(command=_backfill)


def _backfill(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    outcomes: Counter[Outcome] = Counter()
    errors: dict[str, RejectedError] = {}
    last = options.after
    is_complete = False
    try:
        with open_database(environ, "ORDERS_DATABASE_URL") as connection, ProgressLine("originals read") as progress:
            for batch in backfill(connection, after=options.after, dry_run=options.dry_run):
                outcomes += batch.outcomes
                last = batch.last
                errors.update(list(batch.errors.items())[: _MAX_LISTED - len(errors)])
                progress.at(outcomes.total())
        is_complete = True
    finally:
        # After an error or Ctrl-C: what is done stays done, and the next run does not name these originals again.
        if is_complete or outcomes:
            _print_result(options, outcomes, errors, last, is_complete=is_complete)
        if not is_complete and last:
            print(printable(f"not complete: continue with --after={last}"), file=sys.stderr)
    return EXIT_FAILED if outcomes[Outcome.REJECTED] else EXIT_DONE


def _print_result(
    options: argparse.Namespace,
    outcomes: Counter[Outcome],
    errors: Mapping[str, RejectedError],
    last: str,
    *,
    is_complete: bool,
) -> None:
    counts = {"originals": outcomes.total(), **{str(outcome): outcomes[outcome] for outcome in Outcome}}
    if options.json:
        named = [{"order_uid": uid, "code": error.code, "path": error.faults[0].path} for uid, error in errors.items()]
        done = {"dry_run": options.dry_run, "complete": is_complete, "last": last or None}
        print_json({**done, **counts, "rejected_originals": named})
    else:
        print_table([counts], as_json=False)
        for uid, error in errors.items():
            print(printable(f"{uid}: {error}"))
        if unlisted := outcomes[Outcome.REJECTED] - len(errors):
            print(f"… and {count_of(unlisted, 'more original')}")
        if options.dry_run:
            print("dry run: nothing was stored", file=sys.stderr)
