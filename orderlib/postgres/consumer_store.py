"""The consumer's transactions: orders, rejects and offsets, committed together if the fence holds."""

from __future__ import annotations

import contextlib
import hashlib
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
from orderlib.ingestion.records import Batch, OrderChange, PreparedOrder, Record, Reject, TopicPartition
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, lock_holders, open_connection, transaction_with_lock_limit
from orderlib.postgres.errors import READ_ONLY, is_lost, sqlstates, translate_errors
from orderlib.postgres.grants import check_privileges, expect_role, is_superuser
from orderlib.postgres.operations import index_advice
from orderlib.postgres.privileges import WRITER
from orderlib.postgres.rows import COPY_HEADER, COPY_TRAILER, reject_row
from orderlib.postgres.schema import check_schema
from orderlib.postgres.wire import PREPARED_IS_STALE, Wire
from orderlib.postgres.writes import store_orders
from orderlib.repository import Outcome, RecordPosition


@attrs.frozen(kw_only=True)
class BatchResult:
    """The result of a batch."""

    outcomes: Counter[Outcome]
    #: All rejects of the batch, including those that only PostgreSQL refused.
    rejects: tuple[Reject, ...]
    #: How many records have unknown fields.
    with_unknown_fields: int
    #: Seconds by step: fence, orders, rejects, check, commit.
    seconds: Mapping[str, float]


class ConsumerStore:
    """The connection of one consumer group to PostgreSQL.

    For one thread at a time, except ``abort``. Connects when a call needs a connection, also after an outage. Any call
    may raise DatabaseUnavailable, ConfigurationError or TransactionConflict. Then nothing was changed, unless the
    answer to a COMMIT was lost.
    """

    APPLICATION_NAME = "orderlib-consumer"

    def __init__(self, url: str, group: str, clock: Callable[[], float]) -> None:
        self._url = url
        self._group = group
        self._clock = clock
        self._connection: Connection | None = None
        #: Keeps the statements of this connection prepared.
        self._wire: Wire | None = None
        #: Whether this connection has committed a batch, and may have statements that are stale.
        self._has_committed = False
        self._abort_lock = threading.Lock()
        self._aborted = False

    def claim_database(self) -> None:
        """Claim the database for this group. Two groups would overwrite each other's orders.

        Raise ConfigurationError if a table or a privilege is missing, or if the database belongs to another group.
        """
        with self._use_connection() as connection:
            check_privileges(connection, WRITER)
            if connection.execute(queries.GROUP).fetchone() is None:
                with transaction_with_lock_limit(connection):
                    connection.execute(queries.CLAIM_GROUP, {"group": self._group})
            self._require_own_group(connection)

    @property
    def is_superuser(self) -> bool:
        """Return whether the last connection is that of a superuser."""
        return self._connection is not None and is_superuser(self._connection)

    def next_offsets(
        self, topic_ids: Mapping[str, str], partitions: Iterable[TopicPartition]
    ) -> dict[TopicPartition, int]:
        """Return the next offsets of this group, without partitions that it never read.

        ``topic_ids`` has the topic id of each topic.
        """
        with self._use_connection() as connection:
            return _next_offsets(connection, self._keys(topic_ids, partitions), topic_ids)

    def start_partitions(
        self, topic_ids: Mapping[str, str], earliest: Mapping[TopicPartition, int]
    ) -> dict[TopicPartition, int]:
        """Return the next offsets of this group. Add missing ones, at the earliest offset of the partition.

        ``topic_ids`` has the topic id of each topic.
        """
        keys = self._keys(topic_ids, earliest)
        with self._use_connection() as connection:
            known = _next_offsets(connection, keys, topic_ids)
            # Even an INSERT that changes nothing would wait for a row that a frozen consumer has locked.
            new = sorted(earliest.keys() - known.keys())
            if not new:
                return known
            rows = {
                **self._keys(topic_ids, new),
                "topics": [partition.topic for partition in new],
                "next_offsets": [earliest[partition] for partition in new],
            }
            try:
                with transaction_with_lock_limit(connection):
                    connection.execute(queries.START_PARTITIONS, rows)
            except psycopg.errors.ForeignKeyViolation:
                self._require_own_group(connection)
                raise
            return _next_offsets(connection, keys, topic_ids)

    def write(self, batch: Batch, before_commit: Callable[[BatchResult], None]) -> BatchResult:
        """Commit the offsets, orders and rejects of a batch in one transaction.

        If ``before_commit`` raises, nothing is stored. Raises FenceLost with the stored offsets if one of them is not
        the one that the batch expects, or is missing.
        """
        seconds: dict[str, float] = {}
        began_s = self._clock()

        def lap(step: str) -> None:
            nonlocal began_s
            seconds[step] = (now_s := self._clock()) - began_s
            began_s = now_s

        with self._use_connection() as connection:
            wire = self._wire
            assert wire is not None
            try:
                has_rejects = self._begin(connection, wire, batch)
                lap("fence")
                result = attrs.evolve(_write_orders(connection, wire, batch), seconds=seconds)
                lap("orders")
                if has_rejects:
                    _supersede_rejects(connection, batch, result.rejects)
                _copy_rejects(connection, result.rejects)
                lap("rejects")
                before_commit(result)
                lap("check")
                connection.wait(wire.pipeline((queries.COMMIT, ())))
            except BaseException as exc:
                with contextlib.suppress(psycopg.Error):
                    connection.wait(wire.pipeline((queries.ROLLBACK, ())))
                if isinstance(exc, psycopg.errors.LockNotAvailable):
                    # Only after the rollback, because a failed transaction accepts no query.
                    raise self._terminate_blockers(connection, self._keys(batch.topic_ids, batch.ranges)) from exc
                if self._has_committed and PREPARED_IS_STALE.intersection(sqlstates(exc)):
                    # A session that has not committed a batch has no older statements, so a retry would not help it.
                    self.close()
                    raise TransactionConflict(
                        "PostgreSQL: a table has changed since its statements were prepared"
                    ) from exc
                raise
            lap("commit")
            self._has_committed = True
            return result

    def index_advice(self) -> str | None:
        """Return a line of advice if the indexes have outgrown PostgreSQL's memory, else ``None``."""
        with self._use_connection() as connection:
            return index_advice(connection)

    def abort(self) -> None:
        """Make the current call and all later ones fail soon. May be called from any thread.

        It shuts down the socket, because nothing else ends a wait for a peer that no longer answers.
        """
        with self._abort_lock:
            self._aborted = True
            if self._connection is not None and not self._connection.closed:
                # psycopg's error: libpq itself closed the socket meanwhile.
                with (
                    contextlib.suppress(OSError, psycopg.Error),
                    socket.socket(fileno=self._connection.fileno()) as shut,
                ):
                    try:
                        shut.shutdown(socket.SHUT_RDWR)
                    finally:
                        shut.detach()

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            # Not while ``abort`` uses the socket: its number may soon be that of another one.
            with self._abort_lock:
                self._connection.close()

    @contextlib.contextmanager
    def _use_connection(self) -> Iterator[Connection]:
        """Use a connection, a new one if the last was lost. Translate the errors of the block."""
        self._require_not_aborted()
        connection = self._connection
        if connection is None or is_lost(connection):
            self.close()
            connection = self._connect()
        try:
            with translate_errors(connection):
                yield connection
        except BaseException as exc:
            # Do not depend on the state of the transaction, and leave a standby: the next call connects again.
            if connection.pgconn.transaction_status != TransactionStatus.IDLE or READ_ONLY in sqlstates(exc):
                self.close()
            raise

    def _connect(self) -> Connection:
        """Connect, and check the schema."""
        connection = open_connection(self._url, application_name=self.APPLICATION_NAME)
        with self._abort_lock:
            self._connection = connection
        self._wire = Wire(connection.pgconn)
        self._has_committed = False
        try:
            self._require_not_aborted()
            with expect_role(connection, WRITER):
                check_schema(connection)
        except BaseException:
            # Otherwise the next call would use it without the check.
            self.close()
            raise
        return connection

    def _require_not_aborted(self) -> None:
        if self._aborted:
            raise DatabaseUnavailable("PostgreSQL: interrupted")

    def _require_own_group(self, connection: Connection) -> None:
        found = connection.execute(queries.GROUP).fetchone()
        group = found[0] if found else None
        # None after a promotion without the last transactions: the next offset that is added claims it again.
        if group not in {None, self._group}:
            raise ConfigurationError(
                f"this database belongs to consumer group {group!r}, not {self._group!r}: set ORDERS_CONSUMER_GROUP to "
                "that, or rename the group with the admin command `offsets set-group`"
            )

    def _keys(self, topic_ids: Mapping[str, str], partitions: Iterable[TopicPartition]) -> dict[str, object]:
        """Return the parameters that select the rows of these partitions in ``consumer_offsets``."""
        partitions = sorted(partitions)
        return {
            "group": self._group,
            "topic_ids": [topic_ids[topic] for topic, _ in partitions],
            "partitions": [number for _, number in partitions],
        }

    def _begin(self, connection: Connection, wire: Wire, batch: Batch) -> bool:
        """Begin a transaction, and move each offset from the value that the batch expects, or raise FenceLost.

        Return whether records of the batch were rejects before a rewind.
        """
        partitions = sorted(batch.ranges)
        keys = self._keys(batch.topic_ids, partitions)
        group, topic_ids, numbers = keys["group"], keys["topic_ids"], keys["partitions"]
        expected = [batch.ranges[partition].expected_offset for partition in partitions]
        next_offsets = [batch.ranges[partition].next_offset for partition in partitions]
        _, _, moved = connection.wait(
            wire.pipeline(
                (queries.BEGIN_WRITE, ()),
                (queries.LIMIT_LOCK_WAIT, ()),
                (queries.MOVE_OFFSETS, [group, topic_ids, numbers, expected, next_offsets]),
            )
        )
        moved_rows = {(topic_id, number) for topic_id, number, _ in moved}
        lost = {p for p in partitions if (batch.topic_ids[p.topic], p.partition) not in moved_rows}
        if lost:
            stored = _next_offsets(connection, keys, batch.topic_ids)
            if lost - stored.keys():
                self._require_own_group(connection)
            raise FenceLost(lost, stored)
        return any(has_rejects for _, _, has_rejects in moved)

    def _terminate_blockers(
        self, connection: Connection, keys: Mapping[str, object]
    ) -> TransactionConflict | DatabaseUnavailable:
        """Terminate the blocking backends of this role and program. Return the error that the batch raises."""
        terminated = connection.execute(queries.TERMINATE_BLOCKERS, keys).fetchall()
        if terminated:
            return TransactionConflict(f"terminated {len(terminated)} backend(s) of a frozen consumer that held a lock")
        holders = lock_holders(connection, queries.WRITE_LOCK_HOLDERS)
        return DatabaseUnavailable(f"PostgreSQL: another session holds a lock that the batch needs, probably {holders}")


def _next_offsets(
    connection: Connection, keys: Mapping[str, object], topic_ids: Mapping[str, str]
) -> dict[TopicPartition, int]:
    topics = {topic_id: topic for topic, topic_id in topic_ids.items()}
    rows = connection.execute(queries.NEXT_OFFSETS, keys).fetchall()
    return {TopicPartition(topics[topic_id], partition): next_offset for topic_id, partition, next_offset in rows}


def _write_orders(connection: Connection, wire: Wire, batch: Batch) -> BatchResult:
    rejects: list[Reject] = []
    records: list[Record] = []
    changes: list[OrderChange] = []
    for record, classified in batch.classified:
        if isinstance(classified, Reject):
            rejects.append(classified)
        else:
            records.append(record)
            changes.append(classified)
    results = connection.wait(store_orders(wire, changes)) if changes else []
    outcomes = Counter(result for result in results if isinstance(result, Outcome))
    rejects += [
        Reject.of(record, result)
        for record, result in zip(records, results, strict=True)
        if isinstance(result, RefusedByDatabase)
    ]
    known = len(rejects)
    rejects = _without_forgotten(connection, rejects)
    outcomes[Outcome.FORGOTTEN] += known - len(rejects)
    outcomes[Outcome.REJECTED] = len(rejects)
    with_unknown_fields = sum(isinstance(change, PreparedOrder) and change.original is not None for change in changes)
    return BatchResult(outcomes=outcomes, rejects=tuple(rejects), with_unknown_fields=with_unknown_fields, seconds={})


def _without_forgotten(connection: Connection, rejects: list[Reject]) -> list[Reject]:
    """Return the rejects whose key is not a forgotten order_uid."""
    digests = {id(reject): hashlib.sha256(reject.record.key).digest() for reject in rejects if reject.record.key}
    if not digests:
        return rejects
    connection.execute(queries.FORGET_LOCK_SHARED)
    rows = connection.execute(queries.FORGOTTEN_DIGESTS, {"digests": list(digests.values())})
    forgotten = {digest for (digest,) in rows}
    return [reject for reject in rejects if digests.get(id(reject)) not in forgotten]


#: Small parts of rows are joined up to this size before they are sent.
_CHUNK_BYTES = 128 * 1024


def _supersede_rejects(connection: Connection, batch: Batch, rejects: Sequence[Reject]) -> None:
    """Give earlier rejects of records that are not rejected any more the outcome of a redrive: it has nothing to do."""
    rejected = {reject.record.position for reject in rejects}
    handled = [record.position for record, _ in batch.classified if record.position not in rejected]
    connection.execute(queries.SUPERSEDE_REJECTS, _position_columns(handled))


def _position_columns(positions: Sequence[RecordPosition]) -> dict[str, object]:
    return {
        "topic_ids": [position.topic_id for position in positions],
        "partitions": [position.partition for position in positions],
        "offsets": [position.offset for position in positions],
    }


def _copy_rejects(connection: Connection, rejects: Sequence[Reject]) -> None:
    """Store the rejects that are not stored yet. The fence prevents others from storing them meanwhile."""
    if not rejects:
        return
    positions = [reject.record.position for reject in rejects]
    stored = set(connection.execute(queries.STORED_REJECTS, _position_columns(positions)).fetchall())
    new = [
        reject
        for reject, position in zip(rejects, positions, strict=True)
        if (position.topic_id, position.partition, position.offset) not in stored
    ]
    if not new:
        return
    with connection.cursor() as cursor, cursor.copy(queries.COPY_REJECTS) as copy:
        for part in _in_chunks(itertools.chain([COPY_HEADER], *map(_row, new), [COPY_TRAILER])):
            copy.write(part)


def _row(reject: Reject) -> Iterator[bytes]:
    record = reject.record
    position, unstorable = record.position, record.unstorable
    key = position.topic_id, position.partition, position.offset
    headers = None if "headers" in unstorable else record.headers_json
    value = None if "value" in unstorable else record.value
    contents = record.key, value, None if headers is None else headers.encode()
    return reject_row(key, record.topic, record.time, contents, reject.code, _faults_json(reject))


def _in_chunks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Join small parts; pass large ones on as they are."""
    small: list[bytes] = []
    size = 0
    for part in parts:
        if len(part) > _CHUNK_BYTES:
            yield b"".join(small)
            yield part
            small, size = [], 0
            continue
        small.append(part)
        size += len(part)
        if size > _CHUNK_BYTES:
            yield b"".join(small)
            small, size = [], 0
    yield b"".join(small)


def _faults_json(reject: Reject) -> bytes:
    first = [attrs.asdict(fault) for fault in reject.faults]
    return msgspec.json.encode({"total": reject.total_faults, "first": first})
