"""Which errors are worth another try, and how long to wait: the one place that decides."""

from __future__ import annotations

import enum
from random import Random

import attrs


class Fate(enum.Enum):
    """What to do about an error of PostgreSQL."""

    #: A row is at fault: split the batch to find it.
    SPLIT = "split"
    #: Two transactions met: at once again.
    AGAIN = "again"
    #: The server is away, full or busy: wait, then again.
    OUTAGE = "outage"
    #: The set-up is broken, or we do not know: stop.
    STOP = "stop"


#: By whole SQLSTATE or by its class, the first two characters; the longer match counts. Anything else stops.
#: Source: Appendix A of PostgreSQL's manual. XX000 is how Citus reports a violation inside COPY.
FATES = {
    "08": Fate.OUTAGE,  # connection exception
    "22": Fate.SPLIT,  # data exception
    "23": Fate.SPLIT,  # integrity constraint violation
    "25006": Fate.OUTAGE,  # read-only: a standby before its promotion
    "28": Fate.STOP,  # invalid authorization
    "3D": Fate.STOP,  # no such database
    "40": Fate.AGAIN,  # deadlock, serialization failure
    "42": Fate.STOP,  # no such table, no such right
    "53": Fate.OUTAGE,  # disk full, out of memory, too many connections
    "54000": Fate.SPLIT,  # a row too large for an index or a page
    "55": Fate.OUTAGE,  # lock not available
    "57": Fate.OUTAGE,  # shut down, starting up, terminated, cancelled
    "XX000": Fate.SPLIT,
}


def fate_of(sqlstate: str) -> Fate:
    """What an error with this SQLSTATE means for the call that met it."""
    return FATES.get(sqlstate) or FATES.get(sqlstate[:2]) or Fate.STOP


@attrs.define
class Backoff:
    """Growing waits with jitter, so that a herd of programs does not come back in step."""

    rng: Random
    first_s: float = 0.1
    most_s: float = 10.0
    _tries: int = 0

    def next_wait_s(self) -> float:
        """Seconds to wait before the next try: between half and all of a bound that doubles each time."""
        bound = min(self.most_s, self.first_s * 2.0 ** min(self._tries, 16))
        self._tries += 1
        return bound * (0.5 + self.rng.random() / 2)

    def reset(self) -> None:
        """It worked: the next wait is short again."""
        self._tries = 0
