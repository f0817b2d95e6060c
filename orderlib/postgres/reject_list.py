"""What a list of rejects takes and returns, without the content of any record."""

from __future__ import annotations

import datetime as dt
from typing import Self

import attrs

from orderlib.errors import Fault
from orderlib.repository import PAGE_SIZE, encode_cursor, in_utc, is_position, parse_cursor


@attrs.frozen(kw_only=True)
class RejectPosition:
    """The position of a reject with the name of its topic: ``TOPIC/PARTITION/OFFSET``."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


@attrs.frozen(kw_only=True)
class RejectCursor:
    """A position in the list of rejects. ``str`` encodes it as URL-safe text, and ``parse`` decodes that."""

    rejected_at: dt.datetime
    partition: int
    offset: int
    topic_id: str

    def __str__(self) -> str:
        time = self.rejected_at.astimezone(dt.UTC).isoformat()
        return encode_cursor(f"{time} {self.partition} {self.offset} {self.topic_id}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the cursor that ``str`` encoded. Raises InvalidQuery for any other text."""
        return parse_cursor(text, cls._of_plain)

    @classmethod
    def _of_plain(cls, plain: str) -> Self:
        time, partition, offset, topic_id = plain.split(" ", 3)
        cursor = cls(
            rejected_at=dt.datetime.fromisoformat(time), partition=int(partition), offset=int(offset), topic_id=topic_id
        )
        if not is_position(topic_id, cursor.partition, cursor.offset) or cursor.rejected_at.utcoffset() is None:
            raise ValueError("not a position in the list of rejects")
        return cursor


@attrs.frozen(kw_only=True)
class RejectSummary:
    """A reject without the content of its record."""

    position: RejectPosition
    topic_id: str
    #: The record's own time; UTC.
    record_time: dt.datetime
    code: str
    #: The first 100 faults.
    faults: tuple[Fault, ...]
    #: How many faults there were.
    total_faults: int
    rejected_at: dt.datetime
    #: Both ``None`` until it was redriven.
    redriven_at: dt.datetime | None
    redrive_outcome: str | None

    @property
    def cursor(self) -> RejectCursor:
        """The reject's position in the list."""
        return RejectCursor(
            rejected_at=self.rejected_at,
            partition=self.position.partition,
            offset=self.position.offset,
            topic_id=self.topic_id,
        )


@attrs.frozen(kw_only=True)
class RejectPage:
    """One page of the list of rejects."""

    rejects: tuple[RejectSummary, ...]
    #: Continues the list; ``None`` on the last page.
    next_cursor: RejectCursor | None


@attrs.frozen(kw_only=True)
class RejectQuery:
    """Which rejects to list: those that match all filters given."""

    code: str | None = None
    #: The key of the record. Only the writer may read it.
    key: bytes | None = attrs.field(default=None, repr=False)
    #: Only rejects whose key is missing or is no order_uid. Only the writer may read it.
    without_order_uid: bool = False
    #: Only rejects of this time or later, by ``rejected_at``.
    since: dt.datetime | None = attrs.field(default=None, converter=in_utc)
    #: Only rejects from before this time.
    until: dt.datetime | None = attrs.field(default=None, converter=in_utc)
    #: Only rejects that were never redriven.
    not_redriven: bool = False
    #: Only rejects that were never redriven, or were rejected again.
    is_open: bool = False
    oldest_first: bool = False
    cursor: RejectCursor | None = None
    limit: int = PAGE_SIZE
