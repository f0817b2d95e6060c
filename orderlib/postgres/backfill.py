"""Decode stored originals again, by the rules of a release that knows more fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import attrs
import psycopg

from orderlib.errors import Fault, InvalidOrder, RejectedError, TransactionConflict
from orderlib.ingestion.records import PreparedOrder, plan_backfill
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection
from orderlib.postgres.rows import pack_rows
from orderlib.postgres.writes import run_transaction, store, versions_of, within_bytes
from orderlib.repository import Outcome

#: One transaction takes originals up to this number and size, but at least one. The consumer waits while it stores.
_BATCH_ORIGINALS = 1000
_BATCH_BYTES = 8 * 1024 * 1024


@attrs.frozen(kw_only=True)
class BackfillBatch:
    """What one transaction did."""

    #: The order_uid of its last original. The next transaction continues after it.
    last: str
    #: How many orders had each outcome; ``rejected`` are those in ``errors``.
    outcomes: Counter[Outcome]
    #: Originals that the rules of this release or PostgreSQL refuse, by order_uid. They and their orders stay.
    errors: dict[str, RejectedError]


def backfill(connection: Connection, *, after: str = "", dry_run: bool = False) -> Iterator[BackfillBatch]:
    """Decode the stored originals again, sorted by order_uid and beginning after one. Yield what each transaction did.

    * ``stored``: the original has other content by the rules of this release, which is now a new version of the order,
      from the same record. The original stays only if fields of it are still unknown.
    * ``duplicate``: the content is the same.
    * ``forgotten``: it was forgotten meanwhile.
    * ``rejected``: the original is not valid by the rules of this release, or PostgreSQL refuses it.

    A second run changes nothing. With ``dry_run`` nothing is stored, and ``stored`` counts what would be.
    Needs the writer's privileges. Raises TransactionConflict if other writers keep changing the same orders.
    """
    while True:
        batch = run_transaction(connection, partial(_backfill_batch, connection, after, dry_run))
        if batch is None:
            return
        after = batch.last
        yield batch


def _backfill_batch(connection: Connection, after: str, dry_run: bool) -> BackfillBatch | None:
    page = {"after": after, "limit": _BATCH_ORIGINALS}
    rows = within_bytes(connection.execute(queries.ORIGINALS_TO_BACKFILL, page).fetchall(), _BATCH_BYTES)
    if not rows:
        return None
    read = versions_of(row[:-2] for row in rows)
    with psycopg.RawCursor(connection) as cursor:
        values: dict[str, bytes] = dict(cursor.execute(queries.GET_ORIGINALS, [list(read)], binary=True))
    outcomes: Counter[Outcome] = Counter()
    errors: dict[str, RejectedError] = {}
    changed: list[PreparedOrder] = []
    for row in rows:
        uid, version = row[0], read[row[0]]
        if uid not in values:
            raise _conflict_error(uid)
        try:
            prepared_order = PreparedOrder.of_text(values[uid], version.position, row[-2], pack_rows=pack_rows)
            if prepared_order.order_uid != uid:
                raise InvalidOrder([Fault(path="$.order_uid", expected="that of the stored order", found="another")])
        except RejectedError as error:
            errors[uid] = error
            continue
        if prepared_order.content_sha256 == version.content_sha256:
            outcomes[Outcome.DUPLICATE] += 1
        else:
            changed.append(prepared_order)
    if dry_run:
        outcomes[Outcome.STORED] += len(changed)
    elif changed:
        topic_ids = {prepared_order.position.topic_id for prepared_order in changed if prepared_order.position}
        # A batch of the consumer could confirm one of these versions meanwhile, and its position would move back.
        connection.execute(queries.LOCK_OFFSETS, {"topic_ids": sorted(topic_ids)})
        results = store(connection, changed, partial(plan_backfill, read))
        for prepared_order, result in zip(changed, results, strict=True):
            if result is Outcome.SUPERSEDED:
                raise _conflict_error(prepared_order.order_uid)
            if isinstance(result, Outcome):
                outcomes[result] += 1
            else:
                errors[prepared_order.order_uid] = result
    outcomes[Outcome.REJECTED] = len(errors)
    return BackfillBatch(last=rows[-1][0], outcomes=outcomes, errors=errors)


def _conflict_error(order_uid: str) -> TransactionConflict:
    return TransactionConflict(f"order {order_uid} has changed since its original was read")
