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


#: What an error of a statement means, by its whole SQLSTATE or by its class, the first two characters; the longer match
#: counts. Every class of PostgreSQL 18 has its entry (Appendix A of the manual). XX000 is how Citus reports a violation
#: inside COPY. Where a class means that a program or a set-up is wrong, no retry helps: it stops, and says the code.
FATES = {
    "00": Fate.STOP,  # successful completion: not an error
    "01": Fate.STOP,  # warning: not an error
    "02": Fate.STOP,  # no data: not an error
    "03": Fate.STOP,  # SQL statement not yet complete
    "08": Fate.OUTAGE,  # connection exception
    "09": Fate.STOP,  # triggered action exception
    "0A": Fate.STOP,  # feature not supported
    "0B": Fate.STOP,  # invalid transaction initiation
    "0F": Fate.STOP,  # locator exception
    "0L": Fate.STOP,  # invalid grantor
    "0P": Fate.STOP,  # invalid role specification
    "0Z": Fate.STOP,  # diagnostics exception
    "10": Fate.STOP,  # XQuery error
    "20": Fate.STOP,  # case not found
    "21": Fate.STOP,  # cardinality violation
    "22": Fate.SPLIT,  # data exception
    "23": Fate.SPLIT,  # integrity constraint violation
    "24": Fate.STOP,  # invalid cursor state
    "25": Fate.STOP,  # invalid transaction state
    "25006": Fate.OUTAGE,  # read-only: a standby before its promotion
    "25P03": Fate.OUTAGE,  # idle_in_transaction_session_timeout: the session was ended
    "25P04": Fate.OUTAGE,  # transaction_timeout: the session was ended
    "26": Fate.STOP,  # invalid SQL statement name
    "27": Fate.STOP,  # triggered data change violation
    "28": Fate.STOP,  # invalid authorization specification
    "2B": Fate.STOP,  # dependent privilege descriptors still exist
    "2D": Fate.STOP,  # invalid transaction termination
    "2F": Fate.STOP,  # SQL routine exception
    "34": Fate.STOP,  # invalid cursor name
    "38": Fate.STOP,  # external routine exception
    "39": Fate.STOP,  # external routine invocation exception
    "3B": Fate.STOP,  # savepoint exception
    "3D": Fate.STOP,  # invalid catalog name: no such database
    "3F": Fate.STOP,  # invalid schema name
    "40": Fate.AGAIN,  # transaction rollback: deadlock, serialization failure
    "42": Fate.STOP,  # syntax error or access rule violation: no such table, no such right
    "44": Fate.STOP,  # WITH CHECK OPTION violation
    "53": Fate.OUTAGE,  # insufficient resources: disk full, out of memory, too many connections
    "54": Fate.STOP,  # program limit exceeded
    "54000": Fate.SPLIT,  # a row too large for an index or a page
    "55": Fate.OUTAGE,  # object not in prerequisite state: lock not available
    "57": Fate.OUTAGE,  # operator intervention: shut down, starting up, terminated, cancelled, idle for too long
    "58": Fate.OUTAGE,  # system error, external to PostgreSQL: input and output
    "72": Fate.AGAIN,  # snapshot too old; not since PostgreSQL 17
    "F0": Fate.STOP,  # configuration file error
    "HV": Fate.STOP,  # foreign data wrapper error
    "P0": Fate.STOP,  # PL/pgSQL error: raised by a trigger that is not ours
    "XX": Fate.STOP,  # internal error: corrupted data or index
    "XX000": Fate.SPLIT,  # internal error
}

#: The classes for which a refused connection is a configuration error: a protocol or a startup option that the server
#: does not take, a role, password or method that it does not accept, a database that does not exist, a missing right.
#: Every other refusal is an outage, also one with a code that no list has.
REFUSED_FOR_GOOD = frozenset({"0A", "22", "28", "3D", "42"})


def fate_of(sqlstate: str) -> Fate:
    """What an error with this SQLSTATE means for the call that met it. An unforeseen one stops the program."""
    return FATES.get(sqlstate) or FATES.get(sqlstate[:2]) or Fate.STOP


def fate_of_refusal(sqlstate: str) -> Fate:
    """What it means that the server refused a connection with this SQLSTATE."""
    return Fate.STOP if sqlstate[:2] in REFUSED_FOR_GOOD else Fate.OUTAGE


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
