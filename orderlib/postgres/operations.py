"""Operations of the operator: move offsets, forget orders, purge rejects. Changes need the migrator's privileges."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import LiteralString

import attrs
import psycopg

from orderlib.codecs import is_order_uid
from orderlib.errors import ConfigurationError
from orderlib.ingestion.records import StoredOffset
from orderlib.postgres import queries
from orderlib.postgres.connections import Connection, transaction_with_lock_limit
from orderlib.postgres.errors import translate_errors
from orderlib.postgres.grants import expect_role
from orderlib.postgres.privileges import MIGRATOR
from orderlib.postgres.reject_list import RejectPosition
from orderlib.postgres.schema import check_schema


@contextmanager
def as_owner(connection: Connection) -> Iterator[None]:
    """Run one transaction in which the migrator has the owner's privileges.

    Raises ConfigurationError if the schema is missing or too old.
    """
    with (
        expect_role(connection, MIGRATOR),
        translate_errors(connection),
        transaction_with_lock_limit(connection),
    ):
        connection.execute(queries.BECOME_OWNER)
        check_schema(connection)
        yield


def stored_offsets(connection: Connection) -> list[StoredOffset]:
    """Return all stored offsets. Needs the reader's privileges only."""
    with translate_errors(connection):
        rows = connection.execute(queries.ALL_OFFSETS).fetchall()
    return [
        StoredOffset(
            group=group,
            topic=topic,
            topic_id=topic_id,
            partition=partition,
            next_offset=next_offset,
            updated_at=updated_at,
        )
        for group, topic, topic_id, partition, next_offset, updated_at in rows
    ]


def index_advice(connection: Connection) -> str | None:
    """Return one line of advice if the indexes of the orders have outgrown PostgreSQL's shared buffers, else ``None``.

    Their size is as of the last VACUUM or ANALYZE. Needs no privileges on the tables.
    """
    with translate_errors(connection):
        row = connection.execute(queries.OUTGROWN_BUFFERS).fetchone()
    if row is None:
        return None
    return (
        f"the indexes of the orders have {row[0]}, more than PostgreSQL's shared_buffers ({row[1]}): "
        "set it to a quarter of the server's memory, or up to 40 %, because writes become slower as the tables grow"
    )


def reset_offsets(connection: Connection, group: str, topic_id: str, next_offsets: Mapping[int, int]) -> None:
    """Move a group's offsets, all or none. Only with the group stopped: its next batch would lose the fence.

    Raises ConfigurationError for a partition without a stored offset.
    """
    with as_owner(connection):
        for partition, next_offset in sorted(next_offsets.items()):
            moved = connection.execute(
                queries.RESET_OFFSET,
                {"group": group, "topic_id": topic_id, "partition": partition, "next_offset": next_offset},
            )
            if moved.rowcount != 1:
                raise ConfigurationError(
                    f"group {group!r} has no offset for partition {partition} of topic id {topic_id}"
                )


def consumer_group(connection: Connection) -> str | None:
    """Return the consumer group that this database belongs to, or ``None`` before the first consumer started."""
    with translate_errors(connection):
        row = connection.execute(queries.GROUP).fetchone()
    return str(row[0]) if row else None


def set_consumer_group(connection: Connection, group: str) -> None:
    """Rename the group that owns the database and its offsets. Only with the consumers of both groups stopped."""
    with as_owner(connection):
        if connection.execute(queries.RENAME_GROUP, {"group": group}).rowcount == 0:
            connection.execute(queries.CLAIM_GROUP, {"group": group})


@attrs.frozen(kw_only=True)
class Forgotten:
    """What a ``forget`` did."""

    #: How many order_uids are forgotten now that were not before.
    order_uids: int
    #: How many orders and rejects it erased.
    orders: int
    rejects: int


def forget(connection: Connection, order_uid: str) -> Forgotten:
    """Erase an order with all its parts and the rejects whose key is its order_uid, and let no write store it again.

    The order need not exist. The call waits for writes that have begun; later ones have the outcome ``forgotten``.
    Raises DatabaseUnavailable, with nothing changed, if they take longer than 5 s. Raises ValueError if no order may
    have this order_uid: nothing could undo it.
    """
    if not is_order_uid(order_uid):
        raise ValueError("no order may have this order_uid")
    return _forget(connection, lambda: [order_uid])


def forget_customer(connection: Connection, customer_id: str) -> Forgotten:
    """Do the same for all orders of a customer. Other orders of that customer may still be stored later."""

    def order_uids() -> list[str]:
        return [uid for (uid,) in connection.execute(queries.ORDERS_OF_CUSTOMER, {"customer_id": customer_id})]

    return _forget(connection, order_uids)


def forget_again(connection: Connection, digests: Collection[bytes]) -> Forgotten:
    """Do the same for the orders with these SHA-256 digests of their order_uids, as ``forgotten`` returns them."""
    # Only the digests are known: ``list`` finds no order_uids.
    done = _forget(connection, list, digests)
    # No write stores these orders now. So reading all orders needs no lock, which would stop the consumer.
    with as_owner(connection):
        orders = connection.execute(queries.DELETE_ORDERS_BY_DIGEST, {"digests": list(digests)}).rowcount
        connection.execute(queries.DELETE_ERASED_BY_DIGEST, {"digests": list(digests)})
    return attrs.evolve(done, orders=orders)


def forgotten(connection: Connection) -> list[bytes]:
    """Return the SHA-256 digests of all forgotten order_uids. Needs the reader's privileges only."""
    with translate_errors(connection):
        return [digest for (digest,) in connection.execute(queries.FORGOTTEN)]


def _forget(connection: Connection, find: Callable[[], Iterable[str]], digests: Collection[bytes] = ()) -> Forgotten:
    with as_owner(connection):
        connection.execute(queries.FORGET_LOCK_EXCLUSIVE)
        order_uids = list(find())
        all_digests = list({*digests, *(hashlib.sha256(uid.encode()).digest() for uid in order_uids)})
        new = connection.execute(queries.INSERT_FORGOTTEN, {"digests": all_digests}).rowcount
        with psycopg.RawCursor(connection) as cursor:
            orders = cursor.execute(queries.DELETE_ORDERS, [order_uids]).rowcount
            cursor.execute(queries.DELETE_ERASED, [order_uids])
        rejects = connection.execute(queries.DELETE_REJECTS_BY_KEY_DIGEST, {"digests": all_digests}).rowcount
        return Forgotten(order_uids=new, orders=orders, rejects=rejects)


def count_unchecked_rejects(connection: Connection) -> int:
    """Return how many rejects have no order_uid as their key, so that ``forget`` cannot find them."""
    return _count(connection, queries.COUNT_REJECTS_WITHOUT_ORDER_UID)


def count_old_rejects(connection: Connection, age: dt.timedelta) -> int:
    """Return how many rejects are older than this."""
    return _count(connection, queries.COUNT_OLD_REJECTS, {"age": age})


def purge_old_rejects(connection: Connection, age: dt.timedelta) -> int:
    """Delete the rejects older than this, redriven or not. Return how many."""
    with as_owner(connection):
        return connection.execute(queries.PURGE_OLD_REJECTS, {"age": age}).rowcount


def count_rejects_at(connection: Connection, position: RejectPosition) -> int:
    """Return how many rejects are stored for a position: one for each topic id."""
    return _count(connection, queries.COUNT_REJECTS_AT, attrs.asdict(position))


def purge_rejects_at(connection: Connection, position: RejectPosition) -> int:
    """Delete the rejects at a position, redriven or not. Return how many."""
    with as_owner(connection):
        return connection.execute(queries.PURGE_REJECTS_AT, attrs.asdict(position)).rowcount


def _count(connection: Connection, statement: LiteralString, parameters: Mapping[str, object] | None = None) -> int:
    with as_owner(connection):
        row = connection.execute(statement, parameters).fetchone()
        assert row is not None
        return int(row[0])
