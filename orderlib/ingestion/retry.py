"""Which errors are worth another try, and how long to wait: the one place that decides."""

from __future__ import annotations

import enum
from random import Random

import attrs


class ErrorAction(enum.Enum):
    """What to do about an error of PostgreSQL."""

    #: A row is at fault: split the batch to find it.
    BISECT = "split"
    #: Two transactions met: at once again.
    RETRY = "again"
    #: The server is away, full or busy: wait, then again.
    OUTAGE = "outage"
    #: The set-up is broken, or we do not know: stop.
    STOP = "stop"


#: What an error of a statement means, by its whole SQLSTATE or by its class, the first two characters; the longer match
#: counts. Every class of PostgreSQL 18 has its entry (Appendix A of the manual). XX000 is how Citus reports a violation
#: inside COPY. Where a class means that a program or a set-up is wrong, no retry helps: it stops, and says the code.
SQLSTATE_ACTIONS = {
    "00": ErrorAction.STOP,  # successful completion: not an error
    "01": ErrorAction.STOP,  # warning: not an error
    "02": ErrorAction.STOP,  # no data: not an error
    "03": ErrorAction.STOP,  # SQL statement not yet complete
    "08": ErrorAction.OUTAGE,  # connection exception
    "09": ErrorAction.STOP,  # triggered action exception
    "0A": ErrorAction.STOP,  # feature not supported
    "0B": ErrorAction.STOP,  # invalid transaction initiation
    "0F": ErrorAction.STOP,  # locator exception
    "0L": ErrorAction.STOP,  # invalid grantor
    "0P": ErrorAction.STOP,  # invalid role specification
    "0Z": ErrorAction.STOP,  # diagnostics exception
    "10": ErrorAction.STOP,  # XQuery error
    "20": ErrorAction.STOP,  # case not found
    "21": ErrorAction.STOP,  # cardinality violation
    "22": ErrorAction.BISECT,  # data exception
    "23": ErrorAction.BISECT,  # integrity constraint violation
    "24": ErrorAction.STOP,  # invalid cursor state
    "25": ErrorAction.STOP,  # invalid transaction state
    "25006": ErrorAction.OUTAGE,  # read-only: a standby before its promotion
    "25P03": ErrorAction.OUTAGE,  # idle_in_transaction_session_timeout: the session was ended
    "25P04": ErrorAction.OUTAGE,  # transaction_timeout: the session was ended
    "26": ErrorAction.STOP,  # invalid SQL statement name
    "27": ErrorAction.STOP,  # triggered data change violation
    "28": ErrorAction.STOP,  # invalid authorization specification
    "2B": ErrorAction.STOP,  # dependent privilege descriptors still exist
    "2D": ErrorAction.STOP,  # invalid transaction termination
    "2F": ErrorAction.STOP,  # SQL routine exception
    "34": ErrorAction.STOP,  # invalid cursor name
    "38": ErrorAction.STOP,  # external routine exception
    "39": ErrorAction.STOP,  # external routine invocation exception
    "3B": ErrorAction.STOP,  # savepoint exception
    "3D": ErrorAction.STOP,  # invalid catalog name: no such database
    "3F": ErrorAction.STOP,  # invalid schema name
    "40": ErrorAction.RETRY,  # transaction rollback: deadlock, serialization failure
    "42": ErrorAction.STOP,  # syntax error or access rule violation: no such table, no such right
    "44": ErrorAction.STOP,  # WITH CHECK OPTION violation
    "53": ErrorAction.OUTAGE,  # insufficient resources: disk full, out of memory, too many connections
    "54": ErrorAction.STOP,  # program limit exceeded
    "54000": ErrorAction.BISECT,  # a row too large for an index or a page
    "55": ErrorAction.OUTAGE,  # object not in prerequisite state: lock not available
    "57": ErrorAction.OUTAGE,  # operator intervention: shut down, starting up, terminated, cancelled, idle for too long
    "58": ErrorAction.OUTAGE,  # system error, external to PostgreSQL: input and output
    "72": ErrorAction.RETRY,  # snapshot too old; not since PostgreSQL 17
    "F0": ErrorAction.STOP,  # configuration file error
    "HV": ErrorAction.STOP,  # foreign data wrapper error
    "P0": ErrorAction.STOP,  # PL/pgSQL error: raised by a trigger that is not ours
    "XX": ErrorAction.STOP,  # internal error: corrupted data or index
    "XX000": ErrorAction.BISECT,  # internal error
}

#: The classes for which a refused connection is a configuration error: a protocol or a startup option that the server
#: does not take, a role, password or method that it does not accept, a database that does not exist, a missing right.
#: Every other refusal is an outage, also one with a code that no list has.
REFUSED_FOR_GOOD = frozenset({"0A", "22", "28", "3D", "42"})


def classify_sqlstate(sqlstate: str) -> ErrorAction:
    """What an error with this SQLSTATE means for the call that met it. An unforeseen one stops the program."""
    return SQLSTATE_ACTIONS.get(sqlstate) or SQLSTATE_ACTIONS.get(sqlstate[:2]) or ErrorAction.STOP


def classify_refusal(sqlstate: str) -> ErrorAction:
    """What it means that the server refused a connection with this SQLSTATE."""
    return ErrorAction.STOP if sqlstate[:2] in REFUSED_FOR_GOOD else ErrorAction.OUTAGE


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
