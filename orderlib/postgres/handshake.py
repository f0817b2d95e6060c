"""The start of a connection, with the SQLSTATE of a refusal.

libpq has only the message of a refused connection, in the server's language. With verbose errors that message contains
the SQLSTATE as well. psycopg has no call for this, so ``connect_steps`` is psycopg's short connect generator with one
more libpq call.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable

import psycopg
from psycopg import errors, pq
from psycopg.abc import PQGenConn
from psycopg.pq import ConnStatus, PollingStatus
from psycopg.pq.abc import PGconn
from psycopg.waiting import Wait

#: Members of libpq's PGVerbosity.
_DEFAULT, _VERBOSE = 1, 2

#: The SQLSTATE after the severity, which is in any language. The error of the last host comes last.
_SQLSTATE = re.compile(r":  ([0-9A-Z]{5}): ")


def _find_set_verbosity() -> Callable[[int | None, int], object]:
    """Return PQsetErrorVerbosity of the libpq that psycopg uses."""
    module = sys.modules[pq.PGconn.__module__]
    # psycopg's C module is linked with libpq. Its Python module has loaded libpq as `impl.pq`.
    library = module.impl.pq if pq.__impl__ == "python" else ctypes.CDLL(module.__file__)
    function = library.PQsetErrorVerbosity
    function.argtypes = [ctypes.c_void_p, ctypes.c_int]
    function.restype = ctypes.c_int
    return function


_set_error_verbosity = _find_set_verbosity()


def _set_verbosity(pgconn: PGconn, verbosity: int) -> None:
    _set_error_verbosity(pgconn.pgconn_ptr, verbosity)  # type: ignore[attr-defined]  # missing in the Protocol of PGconn


def connect_steps(conninfo: str) -> PQGenConn[PGconn]:
    """Connect to the only host in ``conninfo``, as ``psycopg.generators.connect`` does.

    If the server refuses, raise psycopg's error for the SQLSTATE, or OperationalError without one. If the caller throws
    TimeoutError, raise ConnectionTimeout.
    """
    pgconn = pq.PGconn.connect_start(conninfo.encode())
    _set_verbosity(pgconn, _VERBOSE)
    while True:
        status = PollingStatus.FAILED if pgconn.status == ConnStatus.BAD else pgconn.connect_poll()
        if status == PollingStatus.OK:
            break
        if status == PollingStatus.FAILED:
            raise _refusal(pgconn)
        wait = Wait.R if status == PollingStatus.READING else Wait.W
        try:
            while not (yield pgconn.socket, wait):
                pass
        except TimeoutError:
            # With the connection, because that has the address.
            raise errors.ConnectionTimeout("timeout expired", pgconn=errors.finish_pgconn(pgconn)) from None
    _set_verbosity(pgconn, _DEFAULT)
    pgconn.nonblocking = 1
    return pgconn


def _refusal(pgconn: PGconn) -> psycopg.Error:
    message = pgconn.get_error_message()
    codes = _SQLSTATE.findall(message)
    kind: type[psycopg.Error] = psycopg.OperationalError
    if codes:
        try:
            kind = errors.lookup(codes[-1])
        except KeyError:
            kind = type("UnknownSqlstate", (psycopg.OperationalError,), {"sqlstate": codes[-1]})
    return kind(message, pgconn=errors.finish_pgconn(pgconn))
