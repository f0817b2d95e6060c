"""Every SQL statement of orderlib, each with its purpose. Values go only as parameters.

Written to run unchanged with the tables distributed by ``order_uid`` on Citus: a query of one order has the condition
on each of its tables, a query of several orders on the first, and no temporary table is joined.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import LiteralString

from orderlib.postgres.privileges import PRIVILEGES
from orderlib.postgres.rows import (
    DELIVERY_COLUMNS,
    ITEM_COLUMNS,
    ORDER_COLUMNS,
    ORDER_TIMES,
    PAYMENT_COLUMNS,
    STORE_COLUMNS,
)
from orderlib.repository import Direction
from orderlib.search import SearchField

#: The settings that can change what this SQL means or stores, with the values that it is written for. This is the
#: result of a review of every setting of PostgreSQL 18 that a session may change. The others only choose plans, write
#: logs or limit time and memory (an administrator's limit is respected), or belong to features that orderlib does not
#: use. The administrator chooses the schema and the tablespace (``search_path``, ``default_tablespace``).
SESSION_SETTINGS: dict[LiteralString, LiteralString] = {
    # How values read and write as text. Years 1 and 9999 have no local time in some zones.
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "client_encoding": "UTF8",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    # How the server parses statements and arrays.
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "backslash_quote": "safe_encoding",
    "transform_null_equals": "off",
    "quote_all_identifiers": "off",
    # The defaults of a transaction.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    # Which rows are found, which statements are allowed, and whether an error ends the session.
    "gin_fuzzy_search_limit": "0",
    "row_security": "on",
    "restrict_nonsystem_relation_kind": "",
    "exit_on_error": "off",
    # Only a superuser may change these. `replica` would skip foreign keys, the others would read damaged pages.
    "session_replication_role": "origin",
    "ignore_checksum_failure": "off",
    "zero_damaged_pages": "off",
    # What `bootstrap` and `migrate` create.
    "check_function_bodies": "on",
    "createrole_self_grant": "",
    # Debugging messages would slow down each statement.
    "client_min_messages": "notice",
}
#: Settings of Citus; other servers do not have them. SET LOCAL, such as a limit on waits for locks, counts on the
#: workers, too. What `migrate` creates, and no distributed table uses, stays on the coordinator.
CITUS_SETTINGS: dict[LiteralString, LiteralString] = {
    "citus.propagate_set_commands": "local",
    "citus.create_object_propagation": "deferred",
}
_ALL_SETTINGS: dict[LiteralString, LiteralString] = SESSION_SETTINGS | CITUS_SETTINGS

#: Prepare a new session in one round trip. A setting is touched only if its value differs, because that may need a
#: privilege, and only if the server has it. The transaction is explicit because a serializable one fails on a standby.
#: ``synchronous_commit`` may be stronger than `on`, but not `off`: what was reported as stored must be stored.
SET_UP_SESSION: LiteralString = f"""
BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY;
SELECT set_config(name, wanted, false)
FROM (VALUES {", ".join(f"('{name}', '{value}')" for name, value in _ALL_SETTINGS.items())}) AS s (name, wanted)
WHERE current_setting(name, true) <> wanted;
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';
COMMIT
"""

#: The process that serves this session, and a mark that only this session has.
BACKEND_PID: LiteralString = "SELECT pg_backend_pid()"
MARK_SESSION: LiteralString = "SELECT set_config('orderlib.session', %(token)s, false)"
SESSION_MARK: LiteralString = "SELECT current_setting('orderlib.session', true)"

#: Lift the time limits of the role, the database and the server for the current transaction.
LIFT_TIME_LIMITS: LiteralString = """
SELECT set_config(name, '0', true)
FROM (VALUES ('statement_timeout'), ('transaction_timeout'), ('idle_in_transaction_session_timeout')) AS s (name)
WHERE current_setting(name, true) <> '0'
"""

#: Set up a session of a pool. It reads by key and by other indexes only: a plan that was made while a table was small
#: would scan it until PostgreSQL has new statistics. A scan without an alternative then looks so expensive that
#: PostgreSQL before 18 would compile it each time.
SET_UP_POOL_SESSION: LiteralString = "SET statement_timeout = {}; SET enable_seqscan = off; SET jit = off"

#: Begin a read: all its statements see one snapshot, and none can write.
BEGIN_READ: LiteralString = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
COMMIT: LiteralString = "COMMIT"
#: Whether each statement of the transaction has its own snapshot.
HAS_NEW_SNAPSHOTS: LiteralString = (
    "SELECT current_setting('transaction_isolation') IN ('read committed', 'read uncommitted')"
)
#: When the transaction began: no other one of the session has the same time.
TRANSACTION_TIME: LiteralString = "SELECT transaction_timestamp()"
ROLLBACK: LiteralString = "ROLLBACK"
BEGIN_WRITE: LiteralString = "BEGIN ISOLATION LEVEL READ COMMITTED"


def _columns(names: Iterable[LiteralString], prefix: LiteralString = "") -> LiteralString:
    """Return a list of columns as SQL."""
    return ", ".join(prefix + name for name in names)


#: How many elements PostgreSQL assumes in an array that it does not know.
_ASSUMED_ELEMENTS = 10


def array_of(order_uids: Collection[str]) -> str:
    """Return the array for ``= ANY($1)``. A short one repeats its first element, so that its query is planned once.

    A prepared statement keeps a plan for any array, unless one for the current array looks cheaper. With fewer elements
    than PostgreSQL assumes it always does, and planning the JOIN takes longer than executing it.
    """
    elements = [uid.replace("\\", "\\\\").replace('"', '\\"') for uid in order_uids]
    elements += elements[:1] * (_ASSUMED_ELEMENTS - len(elements))
    return '{"' + '","'.join(elements) + '"}' if elements else "{}"


_CONTENT_COLUMNS: LiteralString = (
    f"{_columns(ORDER_COLUMNS, 'o.')}, {_columns(DELIVERY_COLUMNS, 'd.')}, {_columns(PAYMENT_COLUMNS, 'p.')}"
)
_ORDER_COLUMNS: LiteralString = (
    f"{_CONTENT_COLUMNS}, o.stored_at, o.content_sha256, o.first_stored_at, o.version, "
    "o.source_topic_id, o.source_partition, o.source_offset, o.has_original"
)
_JOINED_TABLES: LiteralString = "orders o JOIN delivery d USING (order_uid) JOIN payment p USING (order_uid)"
_ITEM_COLUMNS: LiteralString = f"order_uid, {_columns(ITEM_COLUMNS)}"

#: One order without its items: one JOIN of three tables, on one shard. Statements that go directly to libpq have
#: PostgreSQL's own placeholders: ``$1``, ``$2``.
GET_ORDER: LiteralString = f"""
SELECT {_ORDER_COLUMNS}
FROM {_JOINED_TABLES}
WHERE o.order_uid = $1 AND d.order_uid = $1 AND p.order_uid = $1
"""

#: The items of one order, sorted by line.
GET_ITEMS: LiteralString = f"SELECT {_ITEM_COLUMNS} FROM items WHERE order_uid = $1 ORDER BY line"

#: The same for any number of orders. With the condition on each table, PostgreSQL would search the whole array again
#: for each order: 20 s for 5,000 of them. Citus needs it only once.
GET_ORDERS: LiteralString = f"SELECT {_ORDER_COLUMNS} FROM {_JOINED_TABLES} WHERE o.order_uid = ANY($1)"
GET_ITEMS_OF_ORDERS: LiteralString = f"""
SELECT {_ITEM_COLUMNS} FROM items WHERE order_uid = ANY($1) ORDER BY order_uid, line
"""

#: The same, but only the first $2 items of each order.
GET_FIRST_ITEMS_OF_ORDERS: LiteralString = f"""
SELECT {_ITEM_COLUMNS} FROM items WHERE order_uid = ANY($1) AND line < $2 ORDER BY order_uid, line
"""

#: All of them up to a limit, for a page. The order of the primary key makes the planner read that index, also without
#: statistics. In the order of the page it would scan and sort the whole table then.
GET_ITEMS_OF_PAGE: LiteralString = f"{GET_ITEMS_OF_ORDERS} LIMIT $2"

#: How many items each order has. Its last line is one step in the primary key, for any number of items.
COUNT_ITEMS: LiteralString = """
SELECT o.order_uid, coalesce((SELECT max(i.line) + 1 FROM items i WHERE i.order_uid = o.order_uid), 0)
FROM orders o WHERE o.order_uid = ANY($1)
"""

#: The current versions of orders. In a caller's transaction they show whether an order was replaced during the read.
GET_VERSIONS: LiteralString = "SELECT order_uid, stored_at, content_sha256 FROM orders WHERE order_uid = ANY($1)"

#: Whether the record at a position was handled, and its reject. Of several topic ids with this name, the one with the
#: latest batch counts.
POSITION_STATE: LiteralString = """
SELECT o.next_offset > $3::bigint, r.code, r.faults, r.redrive_outcome
FROM consumer_offsets o LEFT JOIN rejects r
    ON r.topic_id = o.topic_id AND r.partition = o.partition AND r.record_offset = $3::bigint
WHERE o.topic = $1 AND o.partition = $2::integer
ORDER BY o.updated_at DESC LIMIT 1
"""

#: The stored offset of each partition of a topic id.
NEXT_OFFSETS_OF_TOPIC: LiteralString = "SELECT partition, next_offset FROM consumer_offsets WHERE topic_id = $1"

#: Whether a reject is open: it was never redriven, or was rejected again.
_STILL_REJECTED: LiteralString = "(redrive_outcome IS NULL OR redrive_outcome = 'rejected')"

#: The records of a range of offsets that are still rejected.
REJECTED_RECORDS: LiteralString = f"""
SELECT record_offset, code, faults -> 'first' -> 0 ->> 'path' FROM rejects
WHERE topic_id = $1 AND partition = $2::integer AND record_offset BETWEEN $3::bigint AND $4::bigint
    AND {_STILL_REJECTED}
ORDER BY record_offset LIMIT $5::bigint
"""

#: The content digest of an order: one primary key lookup.
GET_CONTENT_SHA256: LiteralString = "SELECT content_sha256 FROM orders WHERE order_uid = $1"
GET_CONTENT_SHA256_OF_ORDERS: LiteralString = "SELECT order_uid, content_sha256 FROM orders WHERE order_uid = ANY($1)"

#: The original of an order; null if it has none.
GET_ORIGINAL: LiteralString = """
SELECT r.value FROM orders o LEFT JOIN order_originals r ON r.order_uid = o.order_uid AND r.order_uid = $1
WHERE o.order_uid = $1
"""

#: How a page continues from its cursor, and the sort order, for each direction.
_DIRECTIONS: dict[Direction, tuple[LiteralString, LiteralString]] = {
    Direction.OLDER: ("<", "DESC"),
    Direction.NEWER: (">", "ASC"),
}


#: The orders with a phone number, an e-mail address or an item. ``regexp_replace`` and ``lower`` do what
#: ``orderlib.search`` does with the parameter, and are expressions of indexes. "C" is the same in each database: only A
#: to Z have two cases. An array is read along the primary key of orders, however little the planner knows.
_OF_PHONE: LiteralString = """
o.order_uid = ANY(ARRAY(
    SELECT f.order_uid FROM delivery f WHERE regexp_replace(f.phone COLLATE "C", '[^0-9]+', '', 'g') = {}))
"""
_OF_EMAIL: LiteralString = """
o.order_uid = ANY(ARRAY(SELECT f.order_uid FROM delivery f WHERE lower(f.email COLLATE "C") = {}))
"""
_OF_RID: LiteralString = """o.order_uid = ANY(ARRAY(SELECT f.order_uid FROM items f WHERE f.rid COLLATE "C" = {}))"""
#: The orders with this order_uid in any case: $1, in small letters, and those with a capital letter.
_OF_UID: LiteralString = """
o.order_uid = ANY(array_append(ARRAY(
    SELECT f.order_uid FROM orders f WHERE lower(f.order_uid) = {0} AND f.order_uid <> lower(f.order_uid)), {0}))
"""


#: The condition of each filter of a list, with the parameter that it takes.
_ORDER_CONDITIONS: dict[str, LiteralString] = {
    "customer_id": "o.customer_id = {}",
    "track_number": "o.track_number = {}",
    "phone": _OF_PHONE,
    "email": _OF_EMAIL,
    "since": "o.first_stored_at >= {}::timestamptz",
    "until": "o.first_stored_at < {}::timestamptz",
}
_PLACEHOLDERS: tuple[LiteralString, ...] = ("$1", "$2", "$3", "$4", "$5", "$6", "$7", "$8", "$9")


def list_orders(direction: Direction, filters: Collection[str], *, cursor: bool) -> LiteralString:
    """Return the query for a page of orders: $1 is the limit, $2 and $3 the cursor, then the filters as given.

    Each combination of conditions is a statement of its own, so each has its own plan and its own index.
    """
    comparison, sort = _DIRECTIONS[direction]
    after = f" AND (o.first_stored_at, o.order_uid) {comparison} ($2::timestamptz, $3)" if cursor else ""
    where = _all_of(_ORDER_CONDITIONS, filters, iter(_PLACEHOLDERS[3 if cursor else 1 :]))
    return f"""
SELECT {_ORDER_COLUMNS}
FROM {_JOINED_TABLES}
WHERE {where}{after}
ORDER BY o.first_stored_at {sort}, o.order_uid {sort} LIMIT $1
"""


def count_orders(filters: Collection[str]) -> LiteralString:
    """Return the query for the number of orders, up to $1. The other parameters are those of the filters as given."""
    where = _all_of(_ORDER_CONDITIONS, filters, iter(_PLACEHOLDERS[1:]))
    return f"SELECT count(*) FROM (SELECT 1 FROM orders o WHERE {where} LIMIT $1) found"


def _all_of(
    conditions: dict[str, LiteralString], filters: Collection[str], placeholders: Iterator[LiteralString]
) -> LiteralString:
    """Return the conditions of these filters, each with the next placeholder."""
    return " AND ".join(["true", *(conditions[name].format(next(placeholders)) for name in filters)])


#: The newest orders that match a complete value $1, at most $2, for each field of a search.
FIND: dict[SearchField, LiteralString] = {
    field: f"""
SELECT o.order_uid, o.first_stored_at FROM orders o
WHERE {condition}
ORDER BY o.first_stored_at DESC, o.order_uid DESC LIMIT $2
"""
    for field, condition in (
        (SearchField.ORDER_UID, _OF_UID.format("$1")),
        (SearchField.TRACK_NUMBER, "o.track_number = $1"),
        (SearchField.CUSTOMER_ID, "o.customer_id = $1"),
        (SearchField.PHONE, _OF_PHONE.format("$1")),
        (SearchField.EMAIL, _OF_EMAIL.format("$1")),
        (SearchField.RID, _OF_RID.format("$1")),
    )
}

#: The orders whose order_uid in small letters begins with $1: from $1 until before $2, at most the first $3 of
#: each statement. The first one finds those without a capital letter by the primary key, among the first 1,000 that
#: begin with $1; the second one those with a capital letter by an index of their own.
FIND_ORDER_UIDS: tuple[LiteralString, ...] = (
    """
SELECT order_uid, first_stored_at FROM (
    SELECT order_uid FROM (
        SELECT order_uid FROM orders WHERE order_uid >= $1 AND order_uid < $2 ORDER BY order_uid LIMIT 1000
    ) first
    WHERE order_uid = lower(order_uid) ORDER BY order_uid LIMIT $3
) wanted
JOIN orders USING (order_uid)
""",
    """
SELECT order_uid, first_stored_at FROM orders
WHERE lower(order_uid) >= $1 AND lower(order_uid) < $2 AND order_uid <> lower(order_uid)
ORDER BY lower(order_uid), order_uid LIMIT $3
""",
)

#: These orders as a list shows them. The condition is repeated only in the subquery: see ``GET_ORDERS``.
GET_SUMMARIES: LiteralString = """
SELECT o.order_uid, o.customer_id, o.track_number, i.number, p.amount, p.currency, o.first_stored_at
FROM orders o
JOIN payment p USING (order_uid)
JOIN (SELECT order_uid, count(*) AS number FROM items WHERE order_uid = ANY($1) GROUP BY order_uid) i USING (order_uid)
WHERE o.order_uid = ANY($1)
"""

#: The time of the newest order, the number of orders of the last $2, and the rejects by code. Each count stops at $1.
NEWEST_ORDER_TIME: LiteralString = """
SELECT statement_timestamp(), (SELECT first_stored_at FROM orders ORDER BY first_stored_at DESC, order_uid DESC LIMIT 1)
"""
COUNT_STORED_RECENTLY: LiteralString = """
SELECT count(*) FROM (
    SELECT 1 FROM orders WHERE first_stored_at > statement_timestamp() - $2::interval LIMIT $1
) recent
"""
COUNT_REJECTS: LiteralString = """
SELECT wanted.code, (SELECT count(*) FROM (SELECT 1 FROM rejects r WHERE r.code = wanted.code LIMIT $1) found)
FROM unnest($2::text[]) AS wanted (code)
"""

#: The replication delay of this server in seconds; null on a primary. It reads no table, so with Citus it describes the
#: server that executes it. WAL is received before it is replayed, and the two positions are read in that order: 0 means
#: that everything received at that moment is replayed. Without a WAL receiver (the primary is lost, or WAL comes from
#: an archive) the missing WAL is unknown, and the age of the last replayed transaction is an upper bound. A standby
#: that has replayed none since its start contains at least the checkpoint that it started from. A role without further
#: privileges sees in ``pg_stat_wal_receiver`` only whether there is a WAL receiver, which is enough.
REPLICATION_DELAY: LiteralString = """
SELECT (CASE WHEN pg_is_in_recovery() THEN
    CASE WHEN EXISTS (SELECT FROM pg_stat_wal_receiver) AND pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn() THEN 0
    ELSE greatest(0, extract(epoch FROM now() - coalesce(
        pg_last_xact_replay_timestamp(), (SELECT checkpoint_time FROM pg_control_checkpoint()))))
    END
END)::float8
"""

#: The size of the indexes of the orders and that of the shared buffers, if the first is larger. It waits for no lock.
#: PostgreSQL counts the pages of an index when it vacuums or analyzes the table. Citus's coordinator has none.
OUTGROWN_BUFFERS: LiteralString = """
SELECT pg_size_pretty(sum(size)), current_setting('shared_buffers') FROM (
    SELECT c.relpages::bigint * current_setting('block_size')::bigint AS size
    FROM pg_class c JOIN pg_index i ON i.indexrelid = c.oid
    WHERE i.indrelid = ANY(ARRAY['orders', 'delivery', 'payment', 'items']::regclass[])
) indexes
HAVING sum(size) > pg_size_bytes(current_setting('shared_buffers'))
"""

#: A write and `forget` exclude each other until the end of the transaction; writes do not exclude each other. A lock of
#: the table would also wait for readers, such as a long `reconcile`.
_FORGET_LOCK: LiteralString = "7305804402566722661"
FORGET_LOCK_SHARED: LiteralString = f"SELECT FROM pg_advisory_xact_lock_shared({_FORGET_LOCK})"
FORGET_LOCK_EXCLUSIVE: LiteralString = f"SELECT FROM pg_advisory_xact_lock({_FORGET_LOCK})"

#: The digests of those of these orders that were forgotten. While none was, no digest is computed. By an array, because
#: a join would read all digests.
FORGOTTEN_ORDERS: LiteralString = """
SELECT order_uid_sha256 FROM forgotten WHERE order_uid_sha256 = ANY ((
    SELECT array_agg(sha256(convert_to(order_uid, 'UTF8'))) FROM unnest($1::text[]) AS wanted (order_uid)
    WHERE EXISTS (SELECT 1 FROM forgotten)
)::bytea[])
"""

#: Those of these digests that are of forgotten orders.
FORGOTTEN_DIGESTS: LiteralString = """
SELECT order_uid_sha256 FROM forgotten WHERE order_uid_sha256 = ANY(%(digests)s::bytea[])
"""

_VERSION_COLUMNS: LiteralString = """
order_uid, content_sha256, source_topic_id, source_partition, source_offset, first_stored_at, version
"""

#: The stored versions of these orders.
STORED_VERSIONS: LiteralString = f"SELECT {_VERSION_COLUMNS} FROM orders WHERE order_uid = ANY($1::text[])"
#: The positions at which tombstones erased orders: all, or these. An order may be stored beside its position here, if
#: another session stored it at the same time; then the stored order counts.
ALL_ERASED: LiteralString = "SELECT order_uid, topic_id, partition, record_offset FROM erased"
ERASED_VERSIONS: LiteralString = f"{ALL_ERASED} WHERE order_uid = ANY($1::text[])"
#: The time of a write, read after the stored versions. now() may be earlier than a first_stored_at among them.
CLOCK: LiteralString = "SELECT clock_timestamp()"

#: Selects nothing, but makes psycopg begin a transaction.
EMPTY_SELECT: LiteralString = "SELECT"

#: One write of orders. If PostgreSQL refuses one, the rest of the transaction is not affected.
SAVEPOINT: LiteralString = "SAVEPOINT orderlib"
ROLLBACK_TO_SAVEPOINT: LiteralString = "ROLLBACK TO SAVEPOINT orderlib"
RELEASE_SAVEPOINT: LiteralString = "RELEASE SAVEPOINT orderlib"

#: Find orders by key during a write. With old statistics, the planner takes a growing table for a small one and scans
#: it. Afterwards the caller's transaction has its own value again. Also whether the transaction is read-only, because
#: Citus would let COPY write in it.
SETTINGS_OF_WRITE: LiteralString = (
    "SELECT current_setting('enable_seqscan'), current_setting('transaction_read_only') = 'on'"
)
DISABLE_SEQSCAN: LiteralString = "SET LOCAL enable_seqscan = off"
#: Not SET LOCAL: it follows the COPYs in one query, and Citus would send that whole query to the workers.
RESTORE_SEQSCAN: dict[str, LiteralString] = {
    "on": "SELECT set_config('enable_seqscan', 'on', true)",
    "off": "SELECT set_config('enable_seqscan', 'off', true)",
}

#: Delete forgotten orders, or the versions that new ones replace. Delivery, payment, items and the original are deleted
#: with them.
DELETE_ORDERS: LiteralString = "DELETE FROM orders WHERE order_uid = ANY($1::text[])"

COPY_ORDERS: LiteralString = f"""
COPY orders ({_columns(ORDER_COLUMNS)}, {_columns(STORE_COLUMNS)}) FROM STDIN (FORMAT BINARY)
"""
COPY_DELIVERY: LiteralString = f"COPY delivery (order_uid, {_columns(DELIVERY_COLUMNS)}) FROM STDIN (FORMAT BINARY)"
COPY_PAYMENT: LiteralString = f"COPY payment (order_uid, {_columns(PAYMENT_COLUMNS)}) FROM STDIN (FORMAT BINARY)"
COPY_ITEMS: LiteralString = f"COPY items (order_uid, line, {_columns(ITEM_COLUMNS)}) FROM STDIN (FORMAT BINARY)"
COPY_ORIGINALS: LiteralString = "COPY order_originals (order_uid, value) FROM STDIN (FORMAT BINARY)"

#: The position of an erased order is replaced by a later one, and is deleted when the order is stored again, or
#: forgotten.
DELETE_ERASED: LiteralString = "DELETE FROM erased WHERE order_uid = ANY($1::text[])"
INSERT_ERASED: LiteralString = """
INSERT INTO erased (order_uid, topic_id, partition, record_offset)
SELECT * FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[])
"""

#: A duplicate changes only the position that last confirmed the content.
MOVE_POSITIONS: LiteralString = """
UPDATE orders o
SET source_topic_id = n.topic_id, source_partition = n.partition, source_offset = n.record_offset,
    source_time = n.record_time
FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::timestamptz[])
  AS n (order_uid, topic_id, partition, record_offset, record_time)
WHERE o.order_uid = n.order_uid
"""

#: The one consumer group of this database. The first group that starts claims the database.
GROUP: LiteralString = "SELECT consumer_group FROM consumer_groups"
CLAIM_GROUP: LiteralString = "INSERT INTO consumer_groups (consumer_group) VALUES (%(group)s) ON CONFLICT DO NOTHING"
#: Rename the group; its offsets follow (ON UPDATE CASCADE).
RENAME_GROUP: LiteralString = "UPDATE consumer_groups SET consumer_group = %(group)s"

#: Add the offsets of partitions that have none yet.
START_PARTITIONS: LiteralString = """
INSERT INTO consumer_offsets (consumer_group, topic_id, partition, topic, next_offset)
SELECT %(group)s, n.topic_id, n.partition, n.topic, n.next_offset
FROM unnest(%(topic_ids)s::text[], %(partitions)s::int[], %(topics)s::text[], %(next_offsets)s::bigint[])
  AS n (topic_id, partition, topic, next_offset)
ON CONFLICT DO NOTHING
"""

#: The next offsets of a group for some partitions of topic ids.
NEXT_OFFSETS: LiteralString = """
SELECT topic_id, partition, next_offset
FROM consumer_offsets JOIN unnest(%(topic_ids)s::text[], %(partitions)s::int[]) AS n (topic_id, partition)
    USING (topic_id, partition)
WHERE consumer_group = %(group)s
"""

#: The fence: move each offset from where the batch expects it. After a rewind, the batch may handle records again that
#: are rejects: this finds out for each partition by one search in the primary key.
MOVE_OFFSETS: LiteralString = """
UPDATE consumer_offsets o SET next_offset = n.next_offset, updated_at = clock_timestamp()
FROM unnest($2::text[], $3::int[], $4::bigint[], $5::bigint[]) AS n (topic_id, partition, expected, next_offset)
WHERE o.consumer_group = $1 AND o.topic_id = n.topic_id AND o.partition = n.partition
  AND o.next_offset = n.expected
RETURNING o.topic_id, o.partition, EXISTS (
    SELECT FROM rejects r WHERE r.topic_id = n.topic_id AND r.partition = n.partition
        AND r.record_offset >= n.expected AND r.record_offset < n.next_offset)
"""

#: The rejects that are stored already at these positions. Only the transaction that moved the offsets may add others.
STORED_REJECTS: LiteralString = """
SELECT topic_id, partition, record_offset
FROM rejects JOIN unnest(%(topic_ids)s::text[], %(partitions)s::int[], %(offsets)s::bigint[])
  AS wanted (topic_id, partition, record_offset)
    USING (topic_id, partition, record_offset)
"""
#: Record that a batch has handled the records of rejects again, after a rewind, and no longer rejects them. The time is
#: later than that of the orders that it stored. A redrive records the outcomes of the rejects that it has locked; it
#: locks them before the offsets, and waiting for it would be a deadlock.
SUPERSEDE_REJECTS: LiteralString = f"""
UPDATE rejects r SET redriven_at = clock_timestamp(), redrive_outcome = 'superseded'
FROM (
    SELECT topic_id, partition, record_offset
    FROM rejects JOIN unnest(%(topic_ids)s::text[], %(partitions)s::int[], %(offsets)s::bigint[])
      AS handled (topic_id, partition, record_offset)
        USING (topic_id, partition, record_offset)
    WHERE {_STILL_REJECTED} FOR UPDATE OF rejects SKIP LOCKED
) AS n
WHERE r.topic_id = n.topic_id AND r.partition = n.partition AND r.record_offset = n.record_offset
"""
#: By COPY, because an INSERT would need parameters as large as all the records together.
COPY_REJECTS: LiteralString = """
COPY rejects (
    topic_id, partition, record_offset, topic, record_time, key, value, headers, code, faults
) FROM STDIN (FORMAT BINARY)
"""

#: The last migration that was applied.
SCHEMA_NUMBER: LiteralString = "SELECT max(number) FROM schema_migrations"
#: The schema of the first table schema_migrations in the search_path: own_schema if the table has orderlib's columns.
#: Otherwise another migration tool created it, and foreign_schema is set if the schema is the first of the search_path.
#: The owner is no criterion: in a copy that was restored with --no-owner, another role owns the tables, and reads work.
_FIRST_TABLE: LiteralString = """(
    SELECT max(schema) FILTER (WHERE columns = 3) AS own_schema,
           max(schema) FILTER (WHERE columns < 3 AND schema = current_schema()) AS foreign_schema
    FROM (
        SELECT n.nspname::text AS schema, (
            SELECT count(*) FROM pg_attribute a
            WHERE a.attrelid = c.oid AND a.attname IN ('number', 'name', 'applied_at')) AS columns
        FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.oid = to_regclass('schema_migrations')) AS found
) AS first_table"""
#: The fields of ``schema.SchemaLocation``. The role is the one to correct: SET ROLE changes the privileges, but the
#: search_path remains that of the login role. A view that hides a table is taken for a deliberate one.
SCHEMA_LOCATION: LiteralString = f"""
SELECT first_table.own_schema IS NOT NULL,
       (CASE WHEN other.is_usable THEN session_user ELSE current_user END)::text, current_setting('search_path'),
       other.schema, other.is_usable, first_table.foreign_schema, first_table.own_schema, hiding.name
FROM {_FIRST_TABLE} LEFT JOIN LATERAL (
    SELECT n.nspname::text AS schema, has_schema_privilege(n.oid, 'USAGE') AS is_usable
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relname = 'schema_migrations' AND c.relkind = 'r' AND pg_get_userbyid(c.relowner) = 'orders_owner'
    ORDER BY 1 LIMIT 1
) other ON true
LEFT JOIN LATERAL (
    SELECT format('%I.%I', n.nspname, c.relname) AS name
    FROM unnest('{{{",".join(PRIVILEGES)}}}'::text[]) WITH ORDINALITY AS wanted (name, place)
    JOIN pg_class c ON c.oid = to_regclass(wanted.name) JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname <> first_table.own_schema AND c.relkind IN ('r', 'p') ORDER BY wanted.place LIMIT 1
) hiding ON true
"""
#: The schema of the tables, or the first existing schema of the search_path if there are no tables yet. Then the schema
#: in which another program has a table of this name.
TABLE_SCHEMA: LiteralString = (
    f"SELECT coalesce(first_table.own_schema, current_schema()::text), first_table.foreign_schema FROM {_FIRST_TABLE}"
)
#: The schema that the URL or PGOPTIONS chooses: the first of its search_path, if that exists and may be used.
CHOSEN_SCHEMA: LiteralString = """
SELECT CASE WHEN source = 'client' AND lower(btrim(split_part(setting, ',', 1), ' "')) = lower(current_schema())
       THEN current_schema()::text END
FROM pg_settings WHERE name = 'search_path'
"""
#: Whether a schema has the tables. Unlike to_regclass, it does not need USAGE on the schema.
HAS_TABLES: LiteralString = """
SELECT EXISTS (
    SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relname = 'schema_migrations' AND c.relkind = 'r' AND pg_get_userbyid(c.relowner) = 'orders_owner'
      AND n.nspname = %(schema)s)
"""
USE_SCHEMA: LiteralString = "SELECT set_config('search_path', quote_ident(%(schema)s), true)"

#: The server ends the session of a suspended or lost client this soon, because a transaction holds locks that the
#: consumer needs. A shorter limit of an administrator stays. Not SET LOCAL: Citus would send it to the workers, whose
#: transactions are idle while others work.
LIMIT_IDLE_IN_TRANSACTION: LiteralString = """
SELECT set_config('idle_in_transaction_session_timeout', '10s', true)
WHERE current_setting('idle_in_transaction_session_timeout')::interval NOT BETWEEN '1ms' AND '10s'
"""
#: DDL must not wait long for a lock, because all later lock requests wait behind it.
LIMIT_DDL_LOCK_WAIT: LiteralString = "SET LOCAL lock_timeout = '2s'"
#: One schema change at a time. This lock needs more than SELECT on the table, so no program's role can block it.
LOCK_SCHEMA: LiteralString = "LOCK TABLE schema_migrations IN SHARE ROW EXCLUSIVE MODE"
#: Sessions that may block DDL: they hold a lock on the owner's tables, or have changed roles and not committed.
LOCK_HOLDERS: LiteralString = """
SELECT DISTINCT l.pid, a.usename::text, a.application_name
FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid() AND l.locktype = 'relation' AND (
    (l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND l.relation IN (
        SELECT oid FROM pg_class WHERE pg_get_userbyid(relowner) = 'orders_owner'))
    OR (l.relation IN ('pg_authid'::regclass, 'pg_auth_members'::regclass) AND l.mode <> 'AccessShareLock'))
ORDER BY l.pid LIMIT 3
"""
#: Sessions that may block a write: they hold a lock on one of these tables or on its rows, or that of `forget`, and
#: wait for no lock themselves. The lock of a reader blocks no write. The oldest transactions come first.
WRITE_LOCK_HOLDERS: LiteralString = f"""
SELECT l.pid, a.usename::text, a.application_name
FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND ((l.locktype = 'relation' AND l.mode <> 'AccessShareLock' AND l.relation IN (
           SELECT oid FROM pg_class WHERE pg_get_userbyid(relowner) = 'orders_owner'))
       OR (l.locktype = 'advisory' AND (l.classid::bigint << 32 | l.objid::bigint) = {_FORGET_LOCK}))
  AND NOT EXISTS (SELECT FROM pg_locks w WHERE w.pid = l.pid AND NOT w.granted)
GROUP BY l.pid, a.usename, a.application_name, a.xact_start
ORDER BY a.xact_start, l.pid LIMIT 3
"""
DATABASE_ENCODING: LiteralString = (
    "SELECT pg_encoding_to_char(encoding) FROM pg_database WHERE datname = current_database()"
)
BECOME_OWNER: LiteralString = "SET LOCAL ROLE orders_owner"
SCHEMA_MIGRATIONS: LiteralString = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number integer PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())
"""
IS_APPLIED: LiteralString = "SELECT 1 FROM schema_migrations WHERE number = %(number)s"
RECORD_MIGRATION: LiteralString = "INSERT INTO schema_migrations (number, name) VALUES (%(number)s, %(name)s)"

#: The privileges granted on each table of the owner: grantee (null: PUBLIC), privileges, and whether with grant option.
TABLE_GRANTS: LiteralString = """
SELECT c.relname::text, CASE WHEN g.grantee <> 0 THEN pg_get_userbyid(g.grantee)::text END,
       array_agg(concat_ws(' ', g.privilege_type, g.attname)), bool_or(g.is_grantable)
FROM pg_class c CROSS JOIN LATERAL (
    SELECT NULL::name AS attname, a.* FROM aclexplode(c.relacl) a
    UNION ALL
    SELECT t.attname, a.* FROM pg_attribute t CROSS JOIN aclexplode(t.attacl) a WHERE t.attrelid = c.oid
) g
WHERE c.relnamespace = quote_ident(current_schema())::regnamespace AND pg_get_userbyid(c.relowner) = 'orders_owner'
  AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND g.grantee <> c.relowner
GROUP BY 1, 2 ORDER BY 1, 2
"""
TABLES_OF_OWNER: LiteralString = """
SELECT relname::text FROM pg_class
WHERE relnamespace = quote_ident(current_schema())::regnamespace AND relkind IN ('r', 'p', 'v')
  AND pg_get_userbyid(relowner) = 'orders_owner'
"""
REVOKE_ALL: LiteralString = "REVOKE ALL ON {table} FROM {role} CASCADE"
GRANT: LiteralString = "GRANT {privileges} ON {table} TO {role}"

MISSING_ROLES: LiteralString = """
SELECT role FROM unnest(%(roles)s::text[]) AS role WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role)
"""
CREATE_ROLE: LiteralString = "CREATE ROLE {}"
ALLOW_LOGIN: LiteralString = "ALTER ROLE {} LOGIN PASSWORD {} VALID UNTIL 'infinity'"
#: For a bootstrap role that is not a superuser: it has ADMIN on the owner, but SET ROLE needs SET.
ALLOW_BECOMING_OWNER: LiteralString = "GRANT orders_owner TO CURRENT_USER WITH INHERIT FALSE, SET TRUE"
FORBID_BECOMING_OWNER: LiteralString = "REVOKE orders_owner FROM CURRENT_USER GRANTED BY CURRENT_USER"
RESET_ROLE: LiteralString = "RESET ROLE"

#: The wrong attributes, memberships and privileges of roles, database and schemas: whether the programs cannot work
#: that way, the problem, and the statement that corrects it (null: an administrator must decide). An administrator with
#: CREATEROLE keeps ADMIN on the roles that it created, but may not SET ROLE to them. `public` is checked wherever the
#: tables are: it is on the search_path by default, so other roles could create tables there that hide those of
#: orderlib.
ROLE_PROBLEMS: LiteralString = r"""
WITH orderlib_roles AS (
    SELECT oid, rolname FROM pg_roles
    WHERE rolname IN ('orders_owner', 'orders_migrator', 'orders_writer', 'orders_reader')
),
db AS (SELECT oid, datname, datdba, datacl FROM pg_database WHERE datname = current_database()),
schemas AS (
    -- current_schema() is null without USAGE on it.
    SELECT oid, nspname, quote_ident(nspname) = current_setting('search_path') AS is_own,
           EXISTS (SELECT FROM pg_class WHERE relname = 'schema_migrations' AND relnamespace = pg_namespace.oid
                   AND pg_get_userbyid(relowner) = 'orders_owner') AS has_tables,
           coalesce(nspacl, acldefault('n', nspowner)) AS acl
    FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
),
large_objects AS (
    SELECT string_agg(p.oid::regprocedure::text, ', ' ORDER BY p.oid) AS functions
    FROM pg_proc p
    WHERE p.pronamespace = 'pg_catalog'::regnamespace
      AND (p.proname ~ '^lo_' OR p.proname IN ('loread', 'lowrite', 'pg_logical_emit_message'))
      AND EXISTS (SELECT FROM orderlib_roles WHERE has_function_privilege(orderlib_roles.oid, p.oid, 'EXECUTE'))
)
SELECT false AS is_required, format('role %s has %s', rolname, attribute) AS problem,
       format('ALTER ROLE %I NO%s', rolname, attribute) AS remedy
FROM pg_roles r JOIN orderlib_roles USING (oid, rolname) CROSS JOIN LATERAL (VALUES
    ('SUPERUSER', rolsuper), ('CREATEDB', rolcreatedb), ('CREATEROLE', rolcreaterole),
    ('REPLICATION', rolreplication), ('BYPASSRLS', rolbypassrls),
    ('LOGIN', rolcanlogin AND rolname = 'orders_owner'), ('INHERIT', rolinherit AND rolname = 'orders_migrator')
) AS a (attribute, has_it)
WHERE has_it
UNION ALL
SELECT true, format('role %s may have no connection', rolname), format('ALTER ROLE %I CONNECTION LIMIT -1', rolname)
FROM pg_roles JOIN orderlib_roles USING (oid, rolname) WHERE rolconnlimit = 0 AND rolname <> 'orders_owner'
UNION ALL
-- An administrator may want a limit. Needed: a consumer, the next one that starts, and a command; a worker of the API
-- and a command.
SELECT false, format('role %s may have only %s connections, but the programs use %s or more: run ALTER ROLE %I '
                     'CONNECTION LIMIT -1, or set a higher limit', rolname, rolconnlimit, needed.connections, rolname),
       NULL
FROM pg_roles JOIN orderlib_roles USING (oid, rolname)
JOIN (VALUES ('orders_writer', 3), ('orders_reader', 11)) AS needed (role, connections) ON rolname = needed.role
WHERE rolconnlimit BETWEEN 1 AND needed.connections - 1
UNION ALL
SELECT false, format('the password of role %s has expired: run bootstrap with a password for it', rolname), NULL
FROM pg_roles JOIN orderlib_roles USING (oid, rolname) WHERE rolcanlogin AND rolvaliduntil < now()
UNION ALL
SELECT false, format('role %s is a member of %s', member.rolname, granted.rolname),
       format('REVOKE %I FROM %I GRANTED BY %I CASCADE', granted.rolname, member.rolname, grantor.rolname)
FROM pg_auth_members m
JOIN pg_roles granted ON granted.oid = m.roleid
JOIN pg_roles member ON member.oid = m.member
JOIN pg_roles grantor ON grantor.oid = m.grantor
WHERE (m.roleid IN (SELECT oid FROM orderlib_roles) OR m.member IN (SELECT oid FROM orderlib_roles))
  AND NOT (granted.rolname = 'orders_owner' AND member.rolname = 'orders_migrator'
           AND m.set_option AND NOT m.inherit_option AND NOT m.admin_option)
  AND NOT (m.admin_option AND NOT m.set_option AND NOT m.inherit_option
           AND member.rolcreaterole AND m.member NOT IN (SELECT oid FROM orderlib_roles))
UNION ALL
SELECT true, 'role orders_migrator may not become orders_owner',
       'GRANT orders_owner TO orders_migrator WITH INHERIT FALSE, SET TRUE, ADMIN FALSE'
WHERE NOT EXISTS (
    SELECT FROM pg_auth_members
    WHERE roleid = 'orders_owner'::regrole AND member = 'orders_migrator'::regrole AND set_option
)
UNION ALL
SELECT false, format('PUBLIC has %s on database %s', privilege_type, datname),
       format('REVOKE %s ON DATABASE %I FROM PUBLIC', privilege_type, datname)
FROM db CROSS JOIN aclexplode(coalesce(datacl, acldefault('d', datdba)))
WHERE grantee = 0 AND privilege_type IN ('CREATE', 'TEMPORARY')
UNION ALL
SELECT false, format('role %s has %s on database %s', rolname, privilege_type, datname),
       format('REVOKE ALL ON DATABASE %I FROM %I CASCADE', datname, rolname)
FROM db CROSS JOIN aclexplode(datacl) JOIN orderlib_roles ON orderlib_roles.oid = grantee
WHERE grantee <> datdba AND (privilege_type <> 'CONNECT' OR is_grantable OR rolname = 'orders_owner')
UNION ALL
SELECT NOT has_database_privilege(orderlib_roles.oid, db.oid, 'CONNECT'),
       format('role %s was not granted CONNECT on database %s', rolname, datname),
       format('GRANT CONNECT ON DATABASE %I TO %I', datname, rolname)
FROM db CROSS JOIN orderlib_roles
WHERE rolname <> 'orders_owner'
  AND NOT EXISTS (SELECT FROM aclexplode(datacl) WHERE grantee = orderlib_roles.oid AND privilege_type = 'CONNECT')
UNION ALL
SELECT false, format('PUBLIC has CREATE on schema %s', nspname),
       format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC CASCADE', nspname)
FROM schemas CROSS JOIN aclexplode(acl)
WHERE grantee = 0 AND privilege_type = 'CREATE' AND (is_own OR nspname = 'public')
UNION ALL
-- Other programs may need it there.
SELECT false, format('PUBLIC, and so every role, has CREATE on schema %s; if no other program needs that, run REVOKE '
                     'CREATE ON SCHEMA %I FROM PUBLIC', nspname, nspname), NULL
FROM schemas CROSS JOIN aclexplode(acl)
WHERE grantee = 0 AND privilege_type = 'CREATE' AND NOT is_own AND nspname <> 'public'
UNION ALL
SELECT false, format('role %s has CREATE on schema %s', rolname, nspname),
       format('REVOKE CREATE ON SCHEMA %I FROM %I CASCADE', nspname, rolname)
FROM schemas CROSS JOIN aclexplode(acl) JOIN orderlib_roles ON orderlib_roles.oid = grantee
WHERE privilege_type = 'CREATE' AND rolname <> 'orders_owner'
UNION ALL
SELECT NOT has_schema_privilege(orderlib_roles.oid, schemas.oid, needed.privilege),
       format('role %s was not granted %s on schema %s', rolname, needed.privilege, nspname),
       format('GRANT %s ON SCHEMA %I TO %I', needed.privilege, nspname, rolname)
FROM schemas
CROSS JOIN (VALUES ('orders_owner', 'USAGE'), ('orders_owner', 'CREATE'), ('orders_writer', 'USAGE'),
    ('orders_reader', 'USAGE')) AS needed (role, privilege)
JOIN orderlib_roles ON rolname = needed.role
WHERE is_own AND NOT EXISTS (
    SELECT FROM aclexplode(acl) WHERE grantee = orderlib_roles.oid AND privilege_type = needed.privilege
)
UNION ALL
SELECT false, 'the roles may write large objects and messages to the WAL, without limit',
       format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC, orders_owner, orders_migrator, orders_writer, orders_reader',
              functions)
FROM large_objects WHERE functions IS NOT NULL
UNION ALL
SELECT false, format('role %s %s %s', rolname, CASE d.deptype WHEN 'o' THEN 'owns' ELSE 'has privileges on' END,
                     pg_describe_object(d.classid, d.objid, d.objsubid)), NULL
FROM pg_shdepend d JOIN orderlib_roles ON d.refclassid = 'pg_authid'::regclass AND d.refobjid = orderlib_roles.oid
WHERE (d.dbid = (SELECT oid FROM db) OR d.classid IN ('pg_tablespace'::regclass, 'pg_parameter_acl'::regclass)
       OR (d.classid = 'pg_database'::regclass AND d.deptype = 'o'))
  AND d.deptype IN ('o', 'a', 'r') AND rolname <> 'orders_owner'
  AND NOT (d.classid = 'pg_namespace'::regclass AND d.objid IN (SELECT oid FROM schemas WHERE is_own OR has_tables))
  AND NOT (d.classid = 'pg_class'::regclass AND d.deptype = 'a' AND d.objid IN (
      SELECT oid FROM pg_class
      WHERE pg_get_userbyid(relowner) = 'orders_owner'
        AND relnamespace IN (SELECT oid FROM schemas WHERE is_own OR has_tables)))
"""

#: A batch waits at most this long for a row or a table that another session has locked.
LOCK_WAIT_S: LiteralString = "5"
LIMIT_LOCK_WAIT: LiteralString = f"SET LOCAL lock_timeout = '{LOCK_WAIT_S}s'"

#: Terminate the backends of this role and program that may block the batch after that wait: those that locked these
#: offsets (a row's xmax is the locking transaction), and frozen ones, which have sent nothing for that long in a
#: transaction and may have locked an order. The blockers are materialized first, because the planner could call
#: pg_terminate_backend before the other conditions, for every session.
TERMINATE_BLOCKERS: LiteralString = f"""
WITH candidates AS MATERIALIZED (
    SELECT pid, backend_xid,
           wait_event_type = 'Client' AND state_change < now() - interval '{LOCK_WAIT_S}s' AS is_frozen
    FROM pg_stat_activity
    WHERE pid <> pg_backend_pid() AND usename = current_user AND backend_xid IS NOT NULL
      AND datname = current_database() AND application_name = current_setting('application_name')
),
blockers AS MATERIALIZED (
    SELECT pid FROM candidates
    WHERE is_frozen OR backend_xid IN (
        SELECT o.xmax
        FROM consumer_offsets o JOIN unnest(%(topic_ids)s::text[], %(partitions)s::int[]) AS n (topic_id, partition)
            USING (topic_id, partition)
        WHERE o.consumer_group = %(group)s
    )
)
SELECT pid FROM blockers WHERE pg_terminate_backend(pid)
"""

#: The privileges among these that the session's role lacks.
MISSING_PRIVILEGES: LiteralString = """
SELECT current_user, n.table_name, n.privilege
FROM unnest(%(tables)s::text[], %(privileges)s::text[]) AS n (table_name, privilege)
WHERE NOT has_table_privilege(n.table_name, n.privilege)
"""

#: Whether the key of a reject is an order_uid. `encode` leaves the bytes of one as they are.
_KEY_IS_ORDER_UID: LiteralString = """
coalesce(CASE WHEN octet_length(key) BETWEEN 1 AND 128
    THEN encode(key, 'escape') ~ '^(?![.][.]?$)[A-Za-z0-9._:-]+$' END, false)
"""

#: The condition of each filter of a list of rejects, with the parameter that it takes.
_REJECT_CONDITIONS: dict[str, LiteralString] = {
    "code": "code = {}",
    "key": "key = {}::bytea",
    "without_order_uid": f"(NOT {_KEY_IS_ORDER_UID}) = {{}}",
    "since": "rejected_at >= {}::timestamptz",
    "until": "rejected_at < {}::timestamptz",
    "not_redriven": "(redrive_outcome IS NULL) = {}",
    "is_open": f"{_STILL_REJECTED} = {{}}",
}


def list_rejects(filters: Collection[str], *, cursor: bool, oldest_first: bool) -> LiteralString:
    """Return the query for a page of rejects, without the content of the records.

    Its parameters are those of the filters in the sequence given, the four of the cursor, and the limit.
    """
    placeholders = iter(_PLACEHOLDERS)
    comparison, sort = _DIRECTIONS[Direction.NEWER if oldest_first else Direction.OLDER]
    where = _all_of(_REJECT_CONDITIONS, filters, placeholders)
    if cursor:
        row: LiteralString = (
            f"{next(placeholders)}::timestamptz, {next(placeholders)}, {next(placeholders)}::integer, "
            f"{next(placeholders)}::bigint"
        )
        where = f"{where} AND (rejected_at, topic_id, partition, record_offset) {comparison} ({row})"
    return f"""
SELECT topic, partition, record_offset, topic_id, record_time, code, faults, rejected_at, redriven_at, redrive_outcome
FROM rejects WHERE {where}
ORDER BY rejected_at {sort}, topic_id {sort}, partition {sort}, record_offset {sort} LIMIT {next(placeholders)}
"""


def count_rejects(filters: Collection[str]) -> LiteralString:
    """Return the query for the number of rejects. Its parameters are those of the filters in the sequence given."""
    return f"SELECT count(*) FROM rejects WHERE {_all_of(_REJECT_CONDITIONS, filters, iter(_PLACEHOLDERS))}"


def count_rejects_by_path(filters: Collection[str]) -> LiteralString:
    """Return the query for the number of rejects by code and path of the first fault, the most frequent first.

    All elements of an array have one path. The parameters are those of the filters in the sequence given.
    """
    return f"""
SELECT count(*), code, regexp_replace(faults -> 'first' -> 0 ->> 'path', '\\[[0-9]+\\]', '[*]', 'g')
FROM rejects WHERE {_all_of(_REJECT_CONDITIONS, filters, iter(_PLACEHOLDERS))}
GROUP BY 2, 3 ORDER BY 1 DESC, 2, 3
"""


#: The reject at a position of each topic id.
_REJECTS_AT: LiteralString = (
    "rejects WHERE topic = %(topic)s AND partition = %(partition)s AND record_offset = %(offset)s"
)
#: The same, with the first bytes and the size of each part that may be large.
GET_REJECTS: LiteralString = f"""
SELECT topic, partition, record_offset, topic_id, record_time,
       substring(key FROM 1 FOR %(max_bytes)s) AS key, octet_length(key) AS key_bytes,
       substring(value FROM 1 FOR %(max_bytes)s) AS value, octet_length(value) AS value_bytes,
       substring(convert_to(headers::text, 'UTF8') FROM 1 FOR %(max_bytes)s) AS headers,
       octet_length(headers::text) AS headers_bytes, code, faults, rejected_at, redriven_at, redrive_outcome
FROM {_REJECTS_AT}
ORDER BY rejected_at DESC
"""

#: The next records that are still rejected, after a position; their rejects are locked until the transaction ends.
REJECTS_TO_REDRIVE: LiteralString = f"""
SELECT topic_id, partition, record_offset, topic, record_time, coalesce(octet_length(value), 0)
FROM rejects
WHERE {_STILL_REJECTED}
  AND (%(code)s::text IS NULL OR code = %(code)s)
  AND (%(topic)s::text IS NULL OR (topic = %(topic)s AND partition = %(partition)s AND record_offset = %(offset)s))
  AND (topic_id, partition, record_offset) > (%(after_topic_id)s, %(after_partition)s, %(after_offset)s)
ORDER BY topic_id, partition, record_offset
LIMIT %(limit)s
FOR UPDATE
"""

#: The value of a reject, and its key if it has no value: it may be a tombstone.
REJECT_VALUE: LiteralString = """
SELECT CASE WHEN value IS NULL THEN key END, value FROM rejects
WHERE topic_id = %(topic_id)s AND partition = %(partition)s AND record_offset = %(offset)s
"""

#: The SHA-256 of every original.
ORIGINAL_DIGESTS: LiteralString = "SELECT sha256(value) FROM order_originals"

#: The originals of some orders.
GET_ORIGINALS: LiteralString = "SELECT order_uid, value FROM order_originals WHERE order_uid = ANY($1)"

#: The next orders with an original after an order_uid: the stored version, the time of its record, and the size.
ORIGINALS_TO_BACKFILL: LiteralString = f"""
SELECT {_VERSION_COLUMNS}, source_time, octet_length(value)
FROM order_originals JOIN orders USING (order_uid)
WHERE order_uid > %(after)s ORDER BY order_uid LIMIT %(limit)s
"""

#: Block the consumer's batches of these topics until the transaction ends: they could change what it compares with.
LOCK_OFFSETS: LiteralString = """
SELECT partition FROM consumer_offsets WHERE topic_id = ANY(%(topic_ids)s)
ORDER BY topic_id, partition, consumer_group FOR UPDATE
"""

#: Record the outcome of a redrive in the reject.
RECORD_REDRIVE: LiteralString = """
UPDATE rejects SET redriven_at = %(redriven_at)s, redrive_outcome = %(outcome)s
WHERE topic_id = %(topic_id)s AND partition = %(partition)s AND record_offset = %(offset)s
"""

#: Count or delete the rejects older than an interval.
_OLD_REJECTS: LiteralString = "rejects WHERE rejected_at < now() - %(age)s::interval"
COUNT_OLD_REJECTS: LiteralString = f"SELECT count(*) FROM {_OLD_REJECTS}"
PURGE_OLD_REJECTS: LiteralString = f"DELETE FROM {_OLD_REJECTS}"
#: Count or delete the rejects at a position.
COUNT_REJECTS_AT: LiteralString = f"SELECT count(*) FROM {_REJECTS_AT}"
PURGE_REJECTS_AT: LiteralString = f"DELETE FROM {_REJECTS_AT}"

#: Let no write store these orders again.
INSERT_FORGOTTEN: LiteralString = """
INSERT INTO forgotten (order_uid_sha256) SELECT unnest(%(digests)s::bytea[]) ON CONFLICT DO NOTHING
"""
ORDERS_OF_CUSTOMER: LiteralString = "SELECT order_uid FROM orders WHERE customer_id = %(customer_id)s"
#: Delete the rejects whose key is one of these order_uids.
DELETE_REJECTS_BY_KEY_DIGEST: LiteralString = "DELETE FROM rejects WHERE sha256(key) = ANY(%(digests)s::bytea[])"
#: How many rejects `forget` cannot find by an order_uid.
COUNT_REJECTS_WITHOUT_ORDER_UID: LiteralString = f"SELECT count(*) FROM rejects WHERE NOT {_KEY_IS_ORDER_UID}"
#: An order_uid is ASCII without a backslash, so `decode` returns its bytes. It is immutable, as Citus requires here.
_HAS_DIGEST: LiteralString = "sha256(decode(order_uid, 'escape')) = ANY(%(digests)s::bytea[])"
#: These read all rows, because a list of forgotten orders has no order_uids.
DELETE_ORDERS_BY_DIGEST: LiteralString = f"DELETE FROM orders WHERE {_HAS_DIGEST}"
DELETE_ERASED_BY_DIGEST: LiteralString = f"DELETE FROM erased WHERE {_HAS_DIGEST}"

#: The digests of all forgotten orders.
FORGOTTEN: LiteralString = "SELECT order_uid_sha256 FROM forgotten ORDER BY order_uid_sha256"

#: The offsets of all topics and topic ids.
ALL_OFFSETS: LiteralString = """
SELECT consumer_group, topic, topic_id, partition, next_offset, updated_at
FROM consumer_offsets ORDER BY topic, topic_id, partition
"""

#: Move an offset without a fence: only with the group stopped.
RESET_OFFSET: LiteralString = """
UPDATE consumer_offsets SET next_offset = %(next_offset)s, updated_at = clock_timestamp()
WHERE consumer_group = %(group)s AND topic_id = %(topic_id)s AND partition = %(partition)s
"""


def _representable_time(column: LiteralString) -> LiteralString:
    """Return the SQL of a time, or of null if Python cannot represent it."""
    return f"CASE WHEN {column} >= '0001-01-01 00:00:00+00' AND {column} < '10000-01-01 00:00:00+00' THEN {column} END"


#: Whether an order or a reject of a topic id is stored.
SNAPSHOT_HAS_TOPIC: LiteralString = """
SELECT EXISTS (SELECT 1 FROM orders WHERE source_topic_id = %(topic_id)s)
    OR EXISTS (SELECT 1 FROM rejects WHERE topic_id = %(topic_id)s)
"""

#: Every reject, with digests in place of its content.
SNAPSHOT_REJECTS: LiteralString = f"""
SELECT topic_id, partition, record_offset, topic, {_representable_time("record_time")},
    key_sha256, value_sha256, headers_sha256, code, faults_total, fault_paths,
    {_representable_time("redriven_at")}, redrive_outcome,
    isfinite(rejected_at) AND coalesce(redriven_at >= rejected_at AND isfinite(redriven_at), true)
FROM reject_digests
"""

#: Every order with its digest, its position and a check of its times. Clocks may differ by a day.
SNAPSHOT_ORDERS: LiteralString = f"""
SELECT {", ".join(_representable_time(f"o.{name}") if name in ORDER_TIMES else f"o.{name}" for name in ORDER_COLUMNS)},
    {_columns(DELIVERY_COLUMNS, "d.")}, {_columns(PAYMENT_COLUMNS, "p.")},
    o.content_sha256, o.source_topic_id, o.source_partition, o.source_offset, {_representable_time("o.source_time")},
    {_representable_time("o.stored_at")},
    isfinite(o.first_stored_at) AND o.first_stored_at <= o.stored_at AND o.stored_at < now() + interval '1 day',
    o.has_original
FROM orders o LEFT JOIN delivery d USING (order_uid) LEFT JOIN payment p USING (order_uid)
"""

#: The items of some orders, each with its line.
SNAPSHOT_ITEMS: LiteralString = f"""
SELECT {_ITEM_COLUMNS}, line FROM items WHERE order_uid = ANY($1) ORDER BY order_uid, line
"""

#: Every original, with the time when its version was stored.
ALL_ORIGINALS: LiteralString = "SELECT o.stored_at, r.value FROM orders o JOIN order_originals r USING (order_uid)"

#: Rows of the other tables without an order. Foreign keys forbid them.
SNAPSHOT_ORPHANS: LiteralString = """
SELECT 'delivery', d.order_uid FROM delivery d LEFT JOIN orders o USING (order_uid) WHERE o.order_uid IS NULL
UNION
SELECT 'payment', p.order_uid FROM payment p LEFT JOIN orders o USING (order_uid) WHERE o.order_uid IS NULL
UNION
SELECT 'items', i.order_uid FROM items i LEFT JOIN orders o USING (order_uid) WHERE o.order_uid IS NULL
UNION
SELECT 'order_originals', r.order_uid FROM order_originals r LEFT JOIN orders o USING (order_uid)
WHERE o.order_uid IS NULL
"""

#: What is known of one order_uid: its current version, its tombstone, when it was forgotten, and the rejects with this
#: key. The reader sees only the digests of keys.
VERSION_OF: LiteralString = "SELECT version, stored_at FROM orders WHERE order_uid = %(order_uid)s"
TOMBSTONE_OF: LiteralString = (
    "SELECT topic_id, partition, record_offset, erased_at FROM erased WHERE order_uid = %(order_uid)s"
)
FORGOTTEN_AT: LiteralString = "SELECT forgotten_at FROM forgotten WHERE order_uid_sha256 = %(digest)s"
REJECTS_OF_KEY: LiteralString = """
SELECT topic, partition, record_offset, code, redrive_outcome, count(*) OVER ()
FROM reject_digests WHERE key_sha256 = %(digest)s
ORDER BY rejected_at DESC, topic_id DESC, partition DESC, record_offset DESC LIMIT %(limit)s
"""

HAS_CITUS: LiteralString = "SELECT FROM pg_extension WHERE extname = 'citus'"
CITUS_WORKERS: LiteralString = (
    "SELECT nodename FROM pg_dist_node WHERE isactive AND noderole = 'primary' AND groupid <> 0"
)

#: The tables with an order_uid in the schema of ``orders``, which comes first, and whether each is distributed.
ORDER_TABLES: LiteralString = """
SELECT format('%I.%I', n.nspname, c.relname),
       EXISTS (SELECT FROM pg_dist_partition p WHERE p.logicalrelid = c.oid AND p.partmethod = 'h')
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'order_uid' AND NOT a.attisdropped
WHERE c.relkind = 'r' AND n.oid = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('orders'))
    AND pg_get_userbyid(c.relowner) = 'orders_owner'
ORDER BY c.oid <> to_regclass('orders'), c.relname
"""
DISTRIBUTE_ORDERS: LiteralString = (
    "SELECT create_distributed_table(%(table)s, 'order_uid', colocate_with => 'none', shard_count => %(shards)s)"
)
DISTRIBUTE_PART: LiteralString = "SELECT create_distributed_table(%(table)s, 'order_uid', colocate_with => %(orders)s)"
#: Remove the rows that the coordinator had before. No query reads them.
TRUNCATE_LOCAL_COPY: LiteralString = "SELECT truncate_local_data_after_distributing_table(%(table)s)"

KEEP_ROLE_CHANGES_LOCAL: LiteralString = "SET LOCAL citus.enable_alter_role_propagation = off"
#: As orders_owner cannot log in here, nothing else uses its password.
OWNER_VERIFIER: LiteralString = "SELECT rolpassword FROM pg_authid WHERE rolname = 'orders_owner'"
CHOOSE_OWNER_VERIFIER: LiteralString = "ALTER ROLE orders_owner PASSWORD {}"
RUN_ON_WORKERS: LiteralString = (
    "SELECT nodename || ':' || nodeport, success, result FROM run_command_on_workers(%(command)s)"
)
#: Only on this worker: Citus would change the role on every node.
ALLOW_OWNER_LOGIN_ON_WORKER: LiteralString = """
DO $do$ BEGIN
    SET LOCAL citus.enable_alter_role_propagation = off;
    ALTER ROLE orders_owner LOGIN PASSWORD {};
END $do$
"""
#: An administrator may have chosen another method, such as a certificate.
REMOVE_OWNER_AUTHINFO: LiteralString = """
DELETE FROM pg_dist_authinfo WHERE rolename = 'orders_owner' AND authinfo LIKE 'password=%'
"""
ADD_OWNER_AUTHINFO: LiteralString = """
INSERT INTO pg_dist_authinfo (nodeid, rolename, authinfo) SELECT 0, 'orders_owner', %(authinfo)s
WHERE NOT EXISTS (SELECT FROM pg_dist_authinfo WHERE rolename = 'orders_owner')
"""
