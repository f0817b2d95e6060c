"""How far the consumer is, asked with few queries. For programs that send many records and wait for all."""

from __future__ import annotations

import attrs

from orderlib.postgres.repository import PostgresOrderRepository


@attrs.frozen(kw_only=True)
class RejectedRecord:
    """A record that was rejected, and not stored by a redrive since then."""

    offset: int
    #: Why it was rejected.
    code: str
    #: JSON path of the first fault.
    first_path: str | None


class ConsumerProgressRepository(PostgresOrderRepository):
    """A repository of orders that also tells how far the consumer is. It needs the reader's privileges."""

    def next_offsets(self, topic_id: str) -> dict[int, int]:
        """Return the next offset of each partition that a consumer has begun to read."""
        return self._read(lambda read_queries: read_queries.next_offsets(topic_id))

    def rejected_records(
        self, topic_id: str, partition: int, first_offset: int, last_offset: int, limit: int
    ) -> list[RejectedRecord]:
        """Return the rejected records from the first offset to the last one, in this order, at most ``limit``."""
        rows = self._read(
            lambda read_queries: read_queries.rejected_records(topic_id, partition, first_offset, last_offset, limit)
        )
        return [RejectedRecord(offset=offset, code=code, first_path=path) for offset, code, path in rows]
