"""What to do about each SQLSTATE, and how long to wait before a retry.

The table decides for a statement. ``postgres.errors`` decides first about lost and refused connections, and by the
text about errors of Citus workers. Other modules of ``postgres`` treat single SQLSTATEs specially, where they catch
them.
"""

from __future__ import annotations

import enum
import functools
from random import Random

import attrs

#: After this number of conflicts of one transaction, retrying probably does not help.
_MAX_CONFLICTS = 20
#: For the jitter between retries of several writers.
_RNG = Random()  # noqa: S311  not used for a secret


class ErrorAction(enum.Enum):
    """What to do about an error of PostgreSQL."""

    #: A row is invalid: split the batch to find it.
    BISECT = "bisect"
    #: Deadlock or serialization failure: retry immediately.
    RETRY = "retry"
    #: The server is unavailable, full or busy: wait, then retry.
    OUTAGE = "outage"
    #: A configuration error, or an unknown one: stop.
    STOP = "stop"


#: The action for an error of a statement, by SQLSTATE or by class (its first two characters). An entry for the SQLSTATE
#: takes precedence. Every class of PostgreSQL 18 has an entry (Appendix A of the manual). Citus reports a constraint
#: violation inside COPY as XX000. If a class means that a program or its configuration is wrong, a retry cannot help:
#: stop, and log the code.
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
    "25P02": ErrorAction.OUTAGE,  # failed transaction: Citus lost a worker, and reported it in an earlier statement
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
    "42": ErrorAction.STOP,  # syntax error or access rule violation: no such table, no such privilege
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
    "P0": ErrorAction.STOP,  # PL/pgSQL error: raised by a trigger that orderlib did not create
    "XX": ErrorAction.STOP,  # internal error: corrupted data or index
    "XX000": ErrorAction.BISECT,  # internal error
}

#: The classes for which a refused connection is a configuration error: a protocol, startup option, role, password or
#: authentication method that the server does not accept, a missing database or privilege. Every other refusal is an
#: outage, also one with an unknown code.
CONFIGURATION_REFUSALS = frozenset({"0A", "22", "28", "3D", "42"})


def classify_sqlstate(sqlstate: str) -> ErrorAction:
    """Return the action for an error of a statement. For an unknown SQLSTATE it is STOP."""
    return SQLSTATE_ACTIONS.get(sqlstate) or SQLSTATE_ACTIONS.get(sqlstate[:2]) or ErrorAction.STOP


def is_standard(sqlstate: str) -> bool:
    """Return whether PostgreSQL itself has errors of this class. A trigger may raise any other."""
    return sqlstate[:2] in SQLSTATE_ACTIONS


def classify_refusal(sqlstate: str) -> ErrorAction:
    """Return the action for a connection that the server refused with this SQLSTATE."""
    return ErrorAction.STOP if sqlstate[:2] in CONFIGURATION_REFUSALS else ErrorAction.OUTAGE


@attrs.define
class Backoff:
    """Exponential backoff with jitter, so that programs do not all reconnect at the same moment."""

    rng: Random
    first_s: float = 0.1
    max_s: float = 10.0
    _tries: int = 0

    def next_wait_s(self) -> float:
        """Return the wait before the next attempt: from half of a bound to all of it. The bound doubles each time."""
        bound = min(self.max_s, self.first_s * 2.0 ** min(self._tries, 16))
        self._tries += 1
        return bound * (0.5 + self.rng.random() / 2)

    def reset(self) -> None:
        """Begin again with the shortest wait, after a success."""
        self._tries = 0


class Conflicts:
    """The conflicts of one transaction with other writers, each of which may repeat it."""

    def __init__(self) -> None:
        self._count = 0

    @functools.cached_property
    def _backoff(self) -> Backoff:
        return Backoff(_RNG, first_s=0.01, max_s=0.5)

    def next_wait_s(self) -> float | None:
        """Count a conflict. Return how long to wait before the transaction is repeated; ``None`` to give up."""
        self._count += 1
        return self._backoff.next_wait_s() if self._count <= _MAX_CONFLICTS else None
