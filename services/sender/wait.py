"""Wait until the consumer has handled the acknowledged records, and report their outcomes."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

from orderlib.errors import DatabaseUnavailable
from orderlib.postgres.consumer_progress import ConsumerProgressRepository

#: Rejects that one query returns at most.
_REJECTS_AT_ONCE = 1000
#: Rejected records that the report names.
_MAX_NAMED = 10


class SentRecords:
    """The acknowledged records of one run, by partition, and what the consumer has done with them."""

    def __init__(self, progress: ConsumerProgressRepository, topic: str) -> None:
        self._progress = progress
        self._topic = topic
        self._topic_id = ""
        #: Sorted from ``set_topic_id`` on. Eight bytes a record.
        self._offsets: dict[int, array[int]] = {}
        #: How many of these are in a committed batch: handled or rejected.
        self._committed: dict[int, int] = {}
        self._rejects_by_code: Counter[str] = Counter()
        self._named: list[str] = []
        self.total = 0
        #: The last outage; ``None`` if the last query was answered.
        self.outage: DatabaseUnavailable | None = None

    def set_topic_id(self, topic_id: str) -> None:
        """Set the id of the topic: a recreated topic with the same name has other records at these offsets."""
        self._topic_id = topic_id
        self._offsets = {partition: array("q", sorted(offsets)) for partition, offsets in self._offsets.items()}

    def add(self, partition: int, offset: int | None) -> None:
        """Add an acknowledged record. If its offset is not known, its outcome stays unknown."""
        self.total += 1
        if offset is not None:
            self._offsets.setdefault(partition, array("q")).append(offset)

    @property
    def waiting(self) -> int:
        """The number of records that are not handled yet."""
        return self.total - sum(self._committed.values())

    def refresh(self) -> bool:
        """Query what has been handled meanwhile. Return whether there was progress: not during an outage."""
        before = self.waiting
        try:
            next_offsets = self._progress.next_offsets(self._topic_id)
            for partition, offsets in self._offsets.items():
                begin = self._committed.get(partition, 0)
                end = bisect_left(offsets, next_offsets.get(partition, 0), lo=begin)
                if end > begin:
                    self._add_rejects(partition, offsets[begin], offsets[end - 1])
                    self._committed[partition] = end
        except DatabaseUnavailable as exc:
            self.outage = exc
        else:
            self.outage = None
        return self.waiting < before

    def _add_rejects(self, partition: int, first: int, last: int) -> None:
        """Count the rejects of a range. Its batches are committed, and their rejects with them."""
        sent = self._offsets[partition]
        found = []
        while True:
            rejects = self._progress.rejected_records(self._topic_id, partition, first, last, _REJECTS_AT_ONCE)
            for reject in rejects:
                index = bisect_left(sent, reject.offset)
                # Other senders may have records in this range, too.
                if index < len(sent) and sent[index] == reject.offset:
                    found.append(reject)
            if len(rejects) < _REJECTS_AT_ONCE:
                break
            first = rejects[-1].offset + 1
        # Only now: an outage must not count a part of the range twice.
        self._rejects_by_code.update(reject.code for reject in found)
        for reject in found[: _MAX_NAMED - len(self._named)]:
            at = f" at {reject.first_path}" if reject.first_path else ""
            self._named.append(f"rejected {self._topic}/{partition}/{reject.offset}: {reject.code}{at}")

    def summary(self) -> str:
        """Return one line with the outcomes so far."""
        rejected = self._rejects_by_code.total()
        by_code = ", ".join(f"{code} {number:,}" for code, number in sorted(self._rejects_by_code.items()))
        codes = f" ({by_code})" if by_code else ""
        handled = self.total - self.waiting - rejected
        return f"handled {handled:,}, rejected {rejected:,}{codes}, waiting {self.waiting:,}"

    def report(self) -> Iterator[str]:
        """Yield the lines of the result: the summary and the first rejected records."""
        yield self.summary()
        yield from self._named
        if (unnamed := self._rejects_by_code.total() - len(self._named)) > 0:
            yield f"and {unnamed:,} more rejected {'record' if unnamed == 1 else 'records'}"
