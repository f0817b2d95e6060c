"""Refused records: to look at, and to try again in place."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import attrs

from orderlib.errors import RejectNotFound, TransactionConflict
from orderlib.ingestion.records import PreparedOrder, Record, RecordPosition, Reject, plan_redrive
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection
from orderlib.postgres.errors import translated_errors
from orderlib.postgres.writes import store
from orderlib.repository import Outcome

#: Rejects redriven in one transaction. The consumer waits for it.
_REDRIVEN_AT_ONCE = 100


@attrs.frozen(kw_only=True)
class RejectPlace:
    """The name that people give a reject: a topic, a partition, an offset."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


@attrs.frozen(kw_only=True)
class RejectSummary:
    """A reject without what the record says."""

    place: RejectPlace
    topic_id: str
    #: The record's own time; UTC.
    record_time: dt.datetime
    code: str
    #: How many faults were found, and the path of the first.
    faults: int
    first_path: str
    rejected_at: dt.datetime
    #: Both ``None`` until it was redriven.
    redriven_at: dt.datetime | None
    redrive_outcome: str | None


def list_rejects(connection: Connection, *, code: str | None, waiting: bool, limit: int) -> list[RejectSummary]:
    """The oldest rejects; of one code, or only those that were never redriven."""
    with translated_errors(connection):
        rows = connection.execute(queries.LIST_REJECTS, {"code": code, "waiting": waiting, "limit": limit}).fetchall()
    names = [field.name for field in attrs.fields(RejectSummary)]
    return [
        RejectSummary(
            place=RejectPlace(topic=topic, partition=partition, offset=offset),
            **dict(zip(names[1:], rest, strict=True)),
        )
        for topic, partition, offset, *rest in rows
    ]


def get_reject(connection: Connection, place: RejectPlace) -> list[dict[str, Any]]:
    """Return everything stored of the reject at a position, one for each topic id, the newest first.

    Raises RejectNotFound.
    """
    with translated_errors(connection):
        cursor = connection.execute(queries.GET_REJECT, attrs.asdict(place))
        names = [column.name for column in cursor.description or ()]
        found = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
    if not found:
        raise RejectNotFound(str(place))
    return found


def redrive(
    connection: Connection,
    classify_record: Callable[[Record], PreparedOrder | Reject],
    *,
    code: str | None = None,
    place: RejectPlace | None = None,
) -> Iterator[Counter[Outcome]]:
    """Try rejects again, all or by code or one, in the order of their positions; what each transaction came to.

    Each is judged in place, at its own position: stored only if there is no such order or an earlier one of its own
    partition, else superseded. Those that had one of these outcomes are left alone: again is harmless. Those still
    refused may be tried again. The reject stays, with outcome and time.
    """
    after = ("", -1, -1)
    while True:
        try:
            with translated_errors(connection), connection.transaction():
                last, outcomes = _redrive_some(connection, classify_record, code, place, after)
        except TransactionConflict:
            continue
        if last is None:
            return
        after = last
        yield outcomes


def _redrive_some(
    connection: Connection,
    classify_record: Callable[[Record], PreparedOrder | Reject],
    code: str | None,
    place: RejectPlace | None,
    after: tuple[str, int, int],
) -> tuple[tuple[str, int, int] | None, Counter[Outcome]]:
    which = {
        "code": code,
        **(attrs.asdict(place) if place else {"topic": None, "partition": None, "offset": None}),
        **dict(zip(("after_topic_id", "after_partition", "after_offset"), after, strict=True)),
        "limit": _REDRIVEN_AT_ONCE,
    }
    rows = connection.execute(queries.REJECTS_TO_REDRIVE, which).fetchall()
    connection.execute(queries.LOCK_OFFSETS, {"topic_ids": sorted({row[0] for row in rows})})
    # Later than every batch that this redrive sees, and earlier than every order that it stores: reconcile tells by it
    # which of them stored an order.
    [(redriven_at,)] = connection.execute(queries.CLOCK).fetchall()
    outcomes: Counter[Outcome] = Counter()
    for topic_id, partition, offset, topic, record_time, key, value in rows:
        source = RecordPosition(topic_id=topic_id, partition=partition, offset=offset)
        classified = classify_record(Record(source=source, time=record_time, topic=topic, key=key, value=value))
        outcome = _store_alone(connection, classified) if isinstance(classified, PreparedOrder) else Outcome.REJECTED
        position = {"topic_id": topic_id, "partition": partition, "offset": offset}
        done = {**position, "outcome": outcome, "redriven_at": redriven_at}
        connection.execute(queries.RECORD_REDRIVE, done)
        outcomes[outcome] += 1
    return (rows[-1][:3] if rows else None), outcomes


def _store_alone(connection: Connection, prepared_order: PreparedOrder) -> Outcome:
    [result] = store(connection, [prepared_order], plan_redrive)
    return result if isinstance(result, Outcome) else Outcome.REJECTED
