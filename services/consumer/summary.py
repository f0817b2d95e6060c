"""What the consumer has handled, as log events for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from orderlib.repository import Outcome
from services.program import event

#: While records are handled, they are summed up this often.
SUMMARY_S = 10.0


class Summary:
    """Logs how many records had each outcome: every 10 s in which there were any, and of all at the end."""

    def __init__(self, clock: Callable[[], float], log: Callable[..., None] = event) -> None:
        self._clock = clock
        self._log = log
        #: The outcomes of all records, as last seen and as last logged.
        self._seen: Counter[Outcome] = Counter()
        self._logged = self._seen
        #: When the present interval began, and when the last record was handled.
        self._began_s = self._handled_s = clock()
        #: Seconds of activity in earlier intervals.
        self._active_s = 0.0

    def update(self, outcomes: Counter[Outcome], lag: Callable[[], int | None], *, idle: bool) -> None:
        """Take the outcomes of all records so far, and log the new ones if it is time.

        ``idle``: no record waits, so an interval begins with the next one.
        """
        now_s = self._clock()
        if outcomes != self._seen:
            self._seen, self._handled_s = outcomes, now_s
        has_new = self._seen != self._logged
        if now_s - self._began_s < SUMMARY_S and (has_new or not idle):
            return
        if has_new:
            seconds = self._handled_s - self._began_s
            self._active_s += seconds
            self._report("summary", self._seen - self._logged, seconds, lag)
        self._began_s, self._logged = now_s, self._seen

    def end(self, outcomes: Counter[Outcome], lag: Callable[[], int | None]) -> None:
        """Log the outcomes of all records."""
        if outcomes != self._seen:
            self._handled_s = self._clock()
        seconds = self._handled_s - self._began_s if outcomes != self._logged else 0.0
        self._report("summary_of_all", outcomes, self._active_s + seconds, lag)

    def _report(self, name: str, outcomes: Counter[Outcome], seconds: float, lag: Callable[[], int | None]) -> None:
        records = outcomes.total()
        self._log(
            name,
            records=records,
            **{str(outcome): outcomes[outcome] for outcome in Outcome if outcomes[outcome]},
            seconds=round(seconds, 1),
            records_per_second=round(records / seconds) if seconds else 0,
            lag=lag(),
        )
