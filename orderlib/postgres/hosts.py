"""Connect to the first host of a URL that accepts a connection. Silent hosts hardly delay the others."""

from __future__ import annotations

import math
import select
import time
from collections.abc import Mapping, Sequence
from typing import cast

import psycopg
from psycopg.abc import ConnDict
from psycopg.conninfo import conninfo_attempts, make_conninfo, timeout_from_conninfo
from psycopg.pq.abc import PGconn
from psycopg.waiting import Ready, Wait

from orderlib.errors import ConfigurationError, DatabaseUnavailable, OrderlibError
from orderlib.postgres.errors import address, translate
from orderlib.postgres.handshake import connect_steps

#: Wait this long for a host before the next one is tried as well.
_NEXT_HOST_AFTER_S = 0.3
#: Try each host again at this interval while an attempt has no answer. A host that starts to accept connections is then
#: found within a second, although an earlier attempt may never be answered.
_SAME_HOST_AFTER_S = 0.7

_EVENTS = {Wait.R: select.POLLIN, Wait.W: select.POLLOUT, Wait.RW: select.POLLIN | select.POLLOUT}


def connect_to_any(arguments: Mapping[str, str | int]) -> PGconn:
    """Return a connection to the first host that accepts one, in the order of the URL.

    ``target_session_attrs`` and ``load_balance_hosts`` have the meaning that they have in libpq. The whole
    call is limited to ``connect_timeout``, and 0.3 s more for each further host. Raise DatabaseUnavailable or
    ConfigurationError if every host refused, or none accepted in time. The error names each host. It has neither cause
    nor context: libpq's text may quote a part of a password.
    """
    error: OrderlibError
    try:
        return _first_accepted(arguments)
    except OrderlibError as exc:
        error = exc.with_traceback(None)
    except psycopg.Error as exc:
        error = translate(exc)
    except UnicodeError:
        error = ConfigurationError("a setting of the database connection is not UTF-8")
    raise error


def addresses(arguments: Mapping[str, str | int]) -> str:
    """Return the addresses that a URL names, for a message, as `` at host:port``. It resolves no name."""
    hosts = str(arguments.get("host") or arguments.get("hostaddr") or "").split(",")
    ports = str(arguments.get("port") or "").split(",")
    if len(ports) == 1:
        ports *= len(hosts)
    found = (address(host, port or "5432") for host, port in zip(hosts, ports, strict=False))
    return ",".join(filter(None, dict.fromkeys(found)))


def _first_accepted(arguments: Mapping[str, str | int]) -> PGconn:
    parameters = cast("ConnDict", dict(arguments))
    timeout_s = timeout_from_conninfo(parameters)
    hosts = conninfo_attempts(parameters)
    limit = time.monotonic() + timeout_s + _NEXT_HOST_AFTER_S * (len(hosts) - 1)
    pending: list[_Attempt] = []
    failures: dict[int, OrderlibError] = {}
    started = 0
    next_start = -math.inf
    while (now := time.monotonic()) < limit:
        if now >= next_start:
            host_index = started % len(hosts)
            started += 1
            next_start = now + (_NEXT_HOST_AFTER_S if started < len(hosts) else _SAME_HOST_AFTER_S / len(hosts))
            pending.append(_Attempt(host_index, hosts[host_index]))
        for attempt in _ready(pending, min(next_start, limit) - now):
            try:
                if attempt.advance():
                    return attempt.connection
            except psycopg.Error as exc:
                failures[attempt.host_index] = translate(exc)
                pending.remove(attempt)
                if started < len(hosts):
                    next_start = -math.inf
        if not pending and started >= len(hosts):
            break
    for attempt in pending:
        timeout = translate(attempt.time_out())
        failures.setdefault(attempt.host_index, timeout)
    raise _error_to_raise([error for _, error in sorted(failures.items())])


class _Attempt:
    """A connection to one host in progress."""

    connection: PGconn

    def __init__(self, host_index: int, parameters: ConnDict) -> None:
        self.host_index = host_index
        self._steps = connect_steps(make_conninfo("", **parameters))
        self._started = False
        self.file = -1
        self.events = 0

    def advance(self) -> bool:
        """Proceed without waiting. Return whether the connection is established, or raise the error of the attempt."""
        try:
            self.file, wait = self._steps.send(Ready.RW) if self._started else next(self._steps)
        except StopIteration as done:
            self.connection = done.value
            return True
        self._started = True
        self.events = _EVENTS[wait]
        return False

    def time_out(self) -> psycopg.Error:
        """End the attempt, and return its error, which has the address."""
        try:
            self._steps.throw(TimeoutError())
        except psycopg.Error as exc:
            return exc
        raise AssertionError


def _ready(attempts: list[_Attempt], timeout_s: float) -> list[_Attempt]:
    """Return the attempts that can proceed. Wait for one at most this long."""
    if new := [attempt for attempt in attempts if attempt.file < 0]:
        return new
    # A new poll object for each wait, because libpq replaces sockets, and descriptors of closed ones are reused.
    poll = select.poll()
    for attempt in attempts:
        poll.register(attempt.file, attempt.events)
    found = {file for file, _ in poll.poll(max(0, math.ceil(timeout_s * 1000)))}
    return [attempt for attempt in attempts if attempt.file in found]


def _error_to_raise(errors: Sequence[OrderlibError]) -> OrderlibError:
    """Return the error for those of the hosts: an outage if one of them is, because that host may recover."""
    if any(isinstance(error, DatabaseUnavailable) for error in errors):
        return DatabaseUnavailable("; ".join(dict.fromkeys(map(str, errors))))
    return errors[-1]
