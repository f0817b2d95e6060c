"""Lag by partition, and why a partition makes no progress."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import attrs
from prometheus_client import Gauge

from orderlib.errors import OrderlibError
from services.consumer.kafka_consumer import FetchFailed
from services.kafka_errors import UnreadableRecord
from services.program import event

#: How often the log ends are requested.
_LAG_S = 1.0

#: A partition with lag whose next offset has not moved for this long is not ready, whichever member has it.
STALLED_S = 20.0

#: An error that comes again after this long keeps us from being ready; one that has not come again for
#: ``_ERROR_GONE_S`` is over. One that repeats is logged this often.
_ERROR_REPEATS_S = 5.0
_ERROR_GONE_S = 15.0
_ERROR_LOGGED_S = 30.0


class _LogEnds(Protocol):
    """What this needs of Kafka; see ``KafkaConsumer``."""

    def ask_ends(self, partitions: Iterable[int]) -> Callable[[], Mapping[int, int] | None]:
        """Request log ends."""


@attrs.define
class _Repeating:
    error: OrderlibError
    first_s: float
    last_s: float
    logged_s: float


class Progress:
    """How far the group is behind in each partition of the topic, those of other members among them.

    Log ends are requested now and then, and never waited for.
    """

    def __init__(
        self, kafka: _LogEnds, gauge: Gauge, clock: Callable[[], float], log: Callable[..., None] = event
    ) -> None:
        self._kafka = kafka
        self._log = log
        self._gauge = gauge
        self._clock = clock
        self._next_offsets: dict[int, int] = {}
        self._moved_at_s: dict[int, float] = {}
        self._lag: dict[int, int] = {}
        self._shown: set[int] = set()
        self._ask_at_s = clock()
        self._answer: Callable[[], Mapping[int, int] | None] | None = None
        #: By partition; ``None`` for the group.
        self._errors: dict[int | None, _Repeating] = {}

    def at(self, next_offsets: Mapping[int, int]) -> None:
        """Note the stored next offsets of these partitions."""
        for partition, next_offset in next_offsets.items():
            if self._next_offsets.get(partition) != next_offset:
                self._next_offsets[partition] = next_offset
                self._moved_at_s[partition] = self._clock()
                self._errors.pop(partition, None)

    def on_assigned(self, next_offsets: Mapping[int, int]) -> None:
        """Note that the group gave us these partitions, from these offsets on."""
        self._errors.pop(None, None)
        self.at(next_offsets)

    def on_error(self, failed: FetchFailed) -> None:
        """Note an error that the client tries to overcome by itself; log it when it is new, and now and then."""
        now_s = self._clock()
        known = self._errors.get(failed.partition)
        if known is None or type(known.error) is not type(failed.error):
            known = self._errors[failed.partition] = _Repeating(failed.error, now_s, now_s, now_s - _ERROR_LOGGED_S)
        known.error, known.last_s = failed.error, now_s
        if now_s - known.logged_s >= _ERROR_LOGGED_S:
            known.logged_s = now_s
            self._log("kafka_error", logging.WARNING, reason=str(failed.error))

    def turn(self, assigned: frozenset[int], stored: Mapping[int, int], *, aborted: bool) -> None:
        """Show what is known, and ask again when it is time.

        ``stored`` are the next offsets of all partitions as they were last read; ``aborted`` in an outage, in which
        nothing can make progress.
        """
        now_s = self._clock()
        self.at({p: next_offset for p, next_offset in stored.items() if p not in assigned})
        for partition, known in list(self._errors.items()):
            if now_s - known.last_s > _ERROR_GONE_S or (partition is not None and partition not in assigned):
                del self._errors[partition]
        if aborted:
            self._moved_at_s = dict.fromkeys(self._next_offsets, now_s)
        answer, self._answer = self._answer, None
        if answer is not None:
            if (ends := answer()) is None:
                self._answer = answer
            else:
                self._take(ends)
        elif self._next_offsets and now_s >= self._ask_at_s:
            self._ask_at_s = now_s + _LAG_S
            self._answer = self._kafka.ask_ends(self._next_offsets)
        self._show(assigned)

    def error(self) -> OrderlibError | None:
        """Return an error that repeats without progress, or a record that cannot be read."""
        for known in self._errors.values():
            if isinstance(known.error, UnreadableRecord) or known.last_s - known.first_s >= _ERROR_REPEATS_S:
                return known.error
        return None

    def fault(self) -> str | None:
        """Return why records wait although nothing else is wrong; ``None`` if none wait for long."""
        if (error := self.error()) is not None:
            return str(error)
        stalled = [f"[{p}] {self._lag[p]:,}" for p in sorted(self._lag) if self._is_stalled(p)]
        if not stalled:
            return None
        return f"records wait and none was stored for {STALLED_S:g} s; partition and lag: {', '.join(stalled)}"

    def _is_stalled(self, partition: int) -> bool:
        return bool(self._lag.get(partition)) and self._clock() - self._moved_at_s[partition] >= STALLED_S

    def _take(self, ends: Mapping[int, int]) -> None:
        for partition, end in ends.items():
            self._lag[partition] = max(0, end - self._next_offsets[partition])
            if not self._lag[partition]:
                self._moved_at_s[partition] = self._clock()

    def _show(self, assigned: Iterable[int]) -> None:
        """Show the lag of our partitions, and of those that nobody seems to handle."""
        shown = {p for p in self._lag if p in assigned or self._is_stalled(p)}
        for partition in self._shown - shown:
            self._gauge.remove(str(partition))
        for partition in shown:
            self._gauge.labels(str(partition)).set(self._lag[partition])
        self._shown = shown
