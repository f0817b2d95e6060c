"""Every error of the driver is translated, and no message quotes a row."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
from typing import cast

import psycopg
import pytest
from psycopg import errors
from psycopg.pq import ConnStatus, DiagnosticField, PGconn
from psycopg.pq.abc import PGconn as AnyPGconn

from orderlib import ConfigurationError, DatabaseUnavailable, OrderlibError, RefusedByDatabase, TransactionConflict
from orderlib.postgres.errors import HasPGconn, is_lost, translate, translate_errors, wait_for_close

WITH_SQLSTATE = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, psycopg.Error) and isinstance(kind.sqlstate, str)
]
WITHOUT_SQLSTATE = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, psycopg.Error) and kind.sqlstate is None
]


def test_every_sqlstate_has_a_counterpart() -> None:
    for kind in WITH_SQLSTATE:
        ours = translate(kind("secret"))
        assert isinstance(ours, RefusedByDatabase | TransactionConflict | DatabaseUnavailable | ConfigurationError)
        assert "secret" not in str(ours)
        assert str(kind.sqlstate) in str(ours)


@pytest.mark.parametrize("kind", WITHOUT_SQLSTATE)
def test_every_error_of_the_driver_itself_has_a_counterpart(kind: type[psycopg.Error]) -> None:
    assert isinstance(translate(kind("gone")), RefusedByDatabase | DatabaseUnavailable | ConfigurationError)


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (errors.CheckViolation(), RefusedByDatabase),
        (errors.StringDataRightTruncation(), RefusedByDatabase),
        (psycopg.DataError("cannot dump"), RefusedByDatabase),
        (UnicodeEncodeError("utf-8", "secret\ud800", 6, 7, "surrogates not allowed"), RefusedByDatabase),
        (errors.DeadlockDetected(), TransactionConflict),
        (errors.AdminShutdown(), DatabaseUnavailable),
        (errors.LockNotAvailable(), DatabaseUnavailable),
        (errors.DiskFull(), DatabaseUnavailable),
        (psycopg.OperationalError("consuming input failed: server closed the connection"), DatabaseUnavailable),
        (psycopg.OperationalError('invalid integer value "x" for connection option "port"'), ConfigurationError),
        (psycopg.OperationalError('connection is bad: invalid sslmode value: "x"'), ConfigurationError),
        (psycopg.InterfaceError("the connection is closed"), DatabaseUnavailable),
        (errors.UndefinedTable(), ConfigurationError),
        (errors.InsufficientPrivilege(), ConfigurationError),
        (errors.RaiseException(), ConfigurationError),
        (psycopg.ProgrammingError("a bug of ours"), ConfigurationError),
    ],
)
def test_an_error_becomes_the_one_that_says_what_to_do_next(
    error: psycopg.Error | UnicodeEncodeError, ours: type[OrderlibError]
) -> None:
    with pytest.raises(ours) as translated, translate_errors():
        raise error
    assert translated.value.__cause__ is error
    assert "secret" not in str(translated.value)


@pytest.mark.parametrize("raised", ["P0001", "P0004", "45000", "ABCDE", "23514"])
def test_the_message_of_a_trigger_is_not_repeated(raised: str) -> None:
    """It may have data of the row. The server sends it as the answer, or before it ends the session."""
    for severity in ("ERROR", "FATAL"):
        info = dict.fromkeys(DiagnosticField) | {
            DiagnosticField.MESSAGE_PRIMARY: b"the phone +9720000000 is blocked",
            DiagnosticField.SQLSTATE: raised.encode(),
            DiagnosticField.SEVERITY_NONLOCALIZED: severity.encode(),
        }
        error = psycopg.DatabaseError("", info=info)  # type: ignore[arg-type]  # as an unpickled error
        translated = translate(error, writing=False)
        assert "9720000000" not in str(translated)
        assert (raised in str(translated)) == (severity == "ERROR")


@pytest.mark.parametrize(
    ("message", "ours"),
    [
        ("terminating connection due to administrator command", DatabaseUnavailable),
        ("server closed the connection unexpectedly\n\tThis probably means", DatabaseUnavailable),
        ("failure on connection marked as essential: 10.0.0.1:5432", DatabaseUnavailable),
        ("canceling statement due to lock timeout", DatabaseUnavailable),
        ('could not extend file "base/5/16384": No space left on device', DatabaseUnavailable),
        ("deadlock detected", TransactionConflict),
        ('duplicate key value violates unique constraint "orders_pkey_102008"', RefusedByDatabase),
        ('new row for relation "delivery_102014" violates check constraint "delivery_name_check"', RefusedByDatabase),
    ],
)
def test_citus_reports_every_error_of_a_worker_with_the_same_code(message: str, ours: type[OrderlibError]) -> None:
    info = dict.fromkeys(DiagnosticField) | {DiagnosticField.MESSAGE_PRIMARY: message.encode()}
    translated = translate(errors.InternalError_(message, info=info))  # type: ignore[arg-type]  # as an unpickled error
    assert type(translated) is ours
    assert "\n" not in str(translated)


@pytest.mark.parametrize(
    "error",
    [
        psycopg.InternalError("received 2 results from command 'BEGIN'"),
        psycopg.ProgrammingError("COPY cannot be mixed with other operations"),
        psycopg.DataError("cannot dump"),
        psycopg.NotSupportedError(),
        errors.UndefinedTable(),
        errors.CheckViolation(),
        errors.DeadlockDetected(),
        errors.InvalidPassword(),
        UnicodeEncodeError("utf-8", "secret\ud800", 6, 7, "surrogates not allowed"),
        AssertionError("secret"),
        ValueError("secret"),
        OSError(9, "Bad file descriptor"),
    ],
)
def test_on_a_lost_connection_every_error_is_an_outage(error: Exception) -> None:
    lost = psycopg.Connection(PGconn.connect_start(b"host=/nowhere"))
    with pytest.raises(DatabaseUnavailable) as translated, translate_errors(lost):
        raise error
    assert translated.value.__cause__ is error
    assert "secret" not in str(translated.value)
    lost.close()


def test_on_a_lost_connection_our_own_errors_pass_untouched() -> None:
    lost = psycopg.Connection(PGconn.connect_start(b"host=/nowhere"))
    with pytest.raises(ConfigurationError), translate_errors(lost):
        raise ConfigurationError("another group")
    lost.close()


class _Ending:
    """A connection of which ``end`` closes the server's side."""

    def __init__(self) -> None:
        self._socket, self._server = socket.socketpair()
        self.status = ConnStatus.OK

    @property
    def pgconn(self) -> AnyPGconn:
        return cast("AnyPGconn", self)

    @property
    def socket(self) -> int:
        return self._socket.fileno()

    def consume_input(self) -> None:
        assert self._socket.recv(1) == b""
        self.status = ConnStatus.BAD

    def end(self) -> None:
        self._server.close()

    def close(self) -> None:
        self._server.close()
        self._socket.close()


def test_other_tasks_run_while_the_end_of_a_connection_may_arrive() -> None:
    error = psycopg.OperationalError("lost synchronization with server")

    async def lost(connection: HasPGconn) -> bool:
        await wait_for_close(connection, error)
        return is_lost(connection, error)

    async def lost_after_another_task_ends_it(connection: _Ending) -> bool:
        waiting = asyncio.create_task(lost(connection))
        await asyncio.sleep(0)
        connection.end()
        return await waiting

    with contextlib.closing(_Ending()) as ending, contextlib.closing(_Ending()) as open_one:
        assert asyncio.run(lost_after_another_task_ends_it(ending))
        assert not asyncio.run(lost(open_one))


def test_other_errors_pass_untouched() -> None:
    with pytest.raises(ZeroDivisionError), translate_errors():
        raise ZeroDivisionError
