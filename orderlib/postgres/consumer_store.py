"""The consumer's side of the store: orders, rejects and offsets, committed together behind the fence."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import attrs
import msgspec
import psycopg
from psycopg.pq import TransactionStatus

from orderlib.errors import ConfigurationError, DatabaseUnavailable, FenceLost, RefusedByDatabase, TransactionConflict
from orderlib.ingestion.records import Batch, PreparedOrder, Reject
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, connect
from orderlib.postgres.errors import is_lost, translated_errors
from orderlib.postgres.migrate import WRITER_RIGHTS, check_rights, check_schema
from orderlib.postgres.rows import COPY_HEADER, COPY_TRAILER, reject_row
from orderlib.postgres.writes import store
from orderlib.repository import Outcome


@attrs.frozen(kw_only=True)
class BatchResult:
    """What a batch came to."""

    outcomes: Counter[Outcome]
    #: The refused records, also those that only PostgreSQL refused.
    rejects: tuple[Reject, ...]
    #: Seconds by step: fence, orders, rejects, commit.
    seconds: Mapping[str, float]


class ConsumerStore:
    """One connection to the store, for one consumer group.

    Not for several threads at once, but for ``abort``. Connects when it must, also again after an outage. Any call
    may raise DatabaseUnavailable, ConfigurationError or TransactionConflict; nothing took effect then, but for a
    COMMIT without an answer.
    """

    APPLICATION_NAME = "orderlib-consumer"

    def __init__(self, url: str, group: str, clock: Callable[[], float]) -> None:
        self._url = url
        self._group = group
        self._clock = clock
        self._connection: Connection | None = None
        self._abort_lock = threading.Lock()
        self._aborted = False

    def check(self) -> None:
        """Claim the database for this group, because two groups would overwrite each other's orders.

        Raise ConfigurationError if a table or a right is missing, or if the database belongs to another group.
        """
        with self._connected() as connection:
            check_rights(connection, WRITER_RIGHTS)
            if connection.execute(queries.GROUP).fetchone() is None:
                with connection.transaction():
                    connection.execute(queries.LIMIT_LOCK_WAIT)
                    connection.execute(queries.CLAIM_GROUP, {"group": self._group})
            self._require_own_group(connection)

    def next_offsets(self, topic_id: str, partitions: Iterable[int]) -> dict[int, int]:
        """Where this group stands in these partitions; without those that it never read."""
        with self._connected() as connection:
            return _next_offsets(connection, self._position(topic_id, partitions))

    def start_partitions(self, topic: str, topic_id: str, earliest: Mapping[int, int]) -> dict[int, int]:
        """Where this group goes on in these partitions; one that it never read begins at its earliest offset."""
        position = self._position(topic_id, earliest)
        with self._connected() as connection:
            known = _next_offsets(connection, position)
            # Even to do nothing, an INSERT would wait for a row that a frozen consumer is just moving.
            new = sorted(earliest.keys() - known.keys())
            if not new:
                return known
            begun = {**position, "topic": topic, "partitions": new, "next_offsets": [earliest[p] for p in new]}
            try:
                connection.execute(queries.START_PARTITIONS, begun)
            except psycopg.errors.ForeignKeyViolation:
                self._require_own_group(connection)
                raise
            return _next_offsets(connection, position)

    def write(self, batch: Batch, before_commit: Callable[[BatchResult], None]) -> BatchResult:
        """Commit a batch whole: its offsets, its orders, its rejects.

        ``before_commit`` may still raise, and nothing is kept then. Raises FenceLost with where the store is if an
        offset was not where the batch expects it.
        """
        seconds: dict[str, float] = {}
        began_s = self._clock()

        def lap(step: str) -> None:
            nonlocal began_s
            seconds[step] = (now_s := self._clock()) - began_s
            began_s = now_s

        with self._connected() as connection:
            try:
                with connection.transaction():
                    self._fence(connection, batch)
                    lap("fence")
                    written = attrs.evolve(_write_orders(connection, batch), seconds=seconds)
                    lap("orders")
                    _copy_rejects(connection, batch, written.rejects)
                    lap("rejects")
                    before_commit(written)
                    lap("check")
            except psycopg.errors.LockNotAvailable as exc:
                # The transaction must be over before anything else is asked.
                raise self._end_blockers(connection, self._position(batch.topic_id, batch.ranges)) from exc
            lap("commit")
            return written

    def abort(self) -> None:
        """From any thread: make the call under way, and any later one, fail soon.

        Only shutting the socket ends a wait for a peer that is half gone.
        """
        with self._abort_lock:
            self._aborted = True
            if self._connection is not None and not self._connection.closed:
                with contextlib.suppress(OSError), socket.socket(fileno=self._connection.fileno()) as shut:
                    try:
                        shut.shutdown(socket.SHUT_RDWR)
                    finally:
                        shut.detach()

    def close(self) -> None:
        """Disconnect."""
        if self._connection is not None:
            self._connection.close()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Connection]:
        """Use a connection, a new one if the last was lost. Translate the errors of the block."""
        if self._connection is None or is_lost(self._connection):
            self.close()
            connection = connect(self._url, application_name=self.APPLICATION_NAME)
            with self._abort_lock:
                self._connection = connection
            check_schema(connection)
        if self._aborted:
            raise DatabaseUnavailable("PostgreSQL: interrupted")
        try:
            with translated_errors(self._connection):
                yield self._connection
        except BaseException:
            # Whatever state it is in, the next call starts with a new session.
            if self._connection.pgconn.transaction_status != TransactionStatus.IDLE:
                self._connection.close()
            raise

    def _require_own_group(self, connection: Connection) -> None:
        found = connection.execute(queries.GROUP).fetchone()
        group = found[0] if found else None
        if group != self._group:
            raise ConfigurationError(
                f"this database belongs to consumer group {group!r}, not {self._group!r}: set ORDERS_CONSUMER_GROUP to "
                "that, or rename the group with the admin command `offsets set-group`"
            )

    def _position(self, topic_id: str, partitions: Iterable[int]) -> dict[str, object]:
        return {"group": self._group, "topic_id": topic_id, "partitions": sorted(partitions)}

    def _fence(self, connection: Connection, batch: Batch) -> None:
        """Move the offsets from where the batch expects them; all of them, or FenceLost."""
        partitions = sorted(batch.ranges)
        position = self._position(batch.topic_id, partitions)
        moves = {
            **position,
            "expected": [batch.ranges[partition].expected_offset for partition in partitions],
            "next_offsets": [batch.ranges[partition].next_offset for partition in partitions],
        }
        with connection.pipeline():
            connection.execute(queries.LIMIT_LOCK_WAIT)
            moved = connection.execute(queries.MOVE_OFFSETS, moves)
        lost = set(partitions) - {partition for (partition,) in moved.fetchall()}
        if lost:
            there = _next_offsets(connection, position)
            if lost - there.keys():
                self._require_own_group(connection)
                raise ConfigurationError(
                    f"the offsets of partitions {sorted(lost - there.keys())} are gone from consumer_offsets"
                )
            raise FenceLost(lost, there)

    def _end_blockers(
        self, connection: Connection, position: Mapping[str, object]
    ) -> TransactionConflict | DatabaseUnavailable:
        """End the backends of our own kind that are in the way: their processes froze in a transaction."""
        ended = connection.execute(queries.END_BLOCKERS, position).fetchall()
        if ended:
            return TransactionConflict(f"ended {len(ended)} backend(s) of a frozen consumer that held a lock")
        return DatabaseUnavailable("PostgreSQL: another session holds a lock that the batch needs")


def _next_offsets(connection: Connection, position: Mapping[str, object]) -> dict[int, int]:
    return dict(connection.execute(queries.NEXT_OFFSETS, position).fetchall())


def _write_orders(connection: Connection, batch: Batch) -> BatchResult:
    prepared_orders = [classified for _, classified in batch.classified if isinstance(classified, PreparedOrder)]
    results = store(connection, prepared_orders) if prepared_orders else []
    rejects = [classified for _, classified in batch.classified if isinstance(classified, Reject)]
    outcomes = Counter(result for result in results if isinstance(result, Outcome))
    if any(isinstance(result, RefusedByDatabase) for result in results):
        records = [record for record, classified in batch.classified if isinstance(classified, PreparedOrder)]
        rejects += [
            Reject.of(record, result)
            for record, result in zip(records, results, strict=True)
            if isinstance(result, RefusedByDatabase)
        ]
    outcomes[Outcome.REJECTED] = len(rejects)
    return BatchResult(outcomes=outcomes, rejects=tuple(rejects), seconds={})


#: Parts of rows are sent together up to this size.
_SENT_AT_ONCE_BYTES = 128 * 1024


def _copy_rejects(connection: Connection, batch: Batch, rejects: Sequence[Reject]) -> None:
    """Store the rejects that are not stored yet. The fence keeps others from storing them meanwhile."""
    if not rejects:
        return
    sources = [reject.record.source for reject in rejects]
    asked = {
        "topic_id": batch.topic_id,
        "partitions": [source.partition for source in sources],
        "offsets": [source.offset for source in sources],
    }
    stored = set(connection.execute(queries.STORED_REJECTS, asked).fetchall())
    new = [reject for reject in rejects if (reject.record.source.partition, reject.record.source.offset) not in stored]
    if not new:
        return
    with connection.cursor() as cursor, cursor.copy(queries.COPY_REJECTS) as copy:
        for part in _joined(itertools.chain([COPY_HEADER], *map(_row, new), [COPY_TRAILER])):
            copy.write(part)


def _row(reject: Reject) -> Iterator[bytes]:
    record = reject.record
    source, unstorable = record.source, record.unstorable
    headers = None if "headers" in unstorable else record.headers_json
    value = None if "value" in unstorable else record.value
    contents = record.key, value, None if headers is None else headers.encode()
    position = source.topic_id, source.partition, source.offset
    return reject_row(position, record.topic, record.time, contents, reject.code, _faults_json(reject))


def _joined(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Join small parts; pass large ones on as they are."""
    small: list[bytes] = []
    size = 0
    for part in parts:
        if len(part) > _SENT_AT_ONCE_BYTES:
            yield b"".join(small)
            yield part
            small, size = [], 0
            continue
        small.append(part)
        size += len(part)
        if size > _SENT_AT_ONCE_BYTES:
            yield b"".join(small)
            small, size = [], 0
    yield b"".join(small)


def _faults_json(reject: Reject) -> bytes:
    first = [attrs.asdict(fault) for fault in reject.faults]
    return msgspec.json.encode({"total": reject.total_faults, "first": first})
