"""Statements directly over libpq, as generators for psycopg's ``wait`` functions, for threads and asyncio.

A pipeline is one round trip: all statements in one packet, all results in another. psycopg's own pipeline needs three
times the CPU of the client: 0.35 ms an order instead of 0.12 ms.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from typing import LiteralString, TypeVar

import psycopg
from psycopg import generators
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, ExecStatus, Format
from psycopg.pq.abc import PGconn, PGresult
from psycopg.waiting import Ready, Wait

from orderlib.errors import OrderlibError
from orderlib.postgres.adapters import ADAPTERS
from orderlib.postgres.rows import Row

T = TypeVar("T")

#: A prepared statement was deallocated (26000), or its result type changed (0A000). It must be prepared again.
PREPARED_IS_STALE = {"26000", "0A000"}

#: libpq copies data before it sends them, so large values are passed to it in parts.
_COPY_BYTES = 4 * 1024 * 1024

#: A statement with the placeholders ``$1``, ``$2``, …, and its parameters.
Statement = tuple[LiteralString, Sequence[object]]
#: A COPY FROM STDIN, and its data in parts.
Copy = tuple[LiteralString, Iterable[bytes]]


class DeadlineExceeded(OrderlibError):
    """The deadline of a call passed while it waited for PostgreSQL. The repository translates it."""


def run_until(steps: PQGen[T], deadline: float) -> PQGen[T]:
    """Run a generator for psycopg's ``wait`` functions until the deadline, then raise DeadlineExceeded."""
    try:
        wait = next(steps)
        while True:
            ready = yield wait
            if time.monotonic() >= deadline:
                raise DeadlineExceeded("PostgreSQL did not answer in time")
            wait = steps.send(ready)
    except StopIteration as done:
        result: T = done.value
        return result


class Wire:
    """Statements over one connection, one call at a time.

    Each method returns a generator for psycopg's ``wait`` functions. It raises psycopg's errors and leaves the
    connection ready for the next statement, unless it was lost. ``keeps_statements``: prepare each statement once and
    leave it prepared in the session.
    """

    def __init__(self, pgconn: PGconn, *, keeps_statements: bool = True) -> None:
        self.pgconn = pgconn
        self._keeps_statements = keeps_statements
        # Without the connection: in binary, no value depends on its settings.
        self._transformer = Transformer(ADAPTERS)
        self._prepared: dict[LiteralString, bytes] = {}
        self._numbers = itertools.count()

    def pipeline(self, *statements: Statement) -> PQGen[list[list[Row]]]:
        """Execute the statements in one round trip; return the rows of each. After an error the others do nothing."""
        pgconn = self.pgconn
        # Before the pipeline begins: a value that cannot be sent must not leave it open.
        dumped = [(statement, self._dump(values)) for statement, values in statements]
        pgconn.enter_pipeline_mode()
        new: dict[LiteralString, bytes] = {}
        # For each result, the statement that it has prepared, or None if it has rows.
        prepares: list[LiteralString | None] = []
        for statement, parameters in dumped:
            if not self._keeps_statements:
                pgconn.send_query_params(statement.encode(), parameters, result_format=Format.BINARY)
                prepares.append(None)
                continue
            name = self._prepared.get(statement) or new.get(statement)
            if name is None:
                name = new[statement] = f"orderlib_{next(self._numbers)}".encode()
                pgconn.send_prepare(name, statement.encode())
                prepares.append(statement)
            pgconn.send_query_prepared(name, parameters, result_format=Format.BINARY)
            prepares.append(None)
        pgconn.pipeline_sync()
        results: list[PGresult] = []
        try:
            yield from self._collect_results(results)
        except psycopg.Error as exc:
            # PostgreSQL keeps a prepared statement after the error of a later one, and after a rollback.
            answered = prepares[: len(results)]
            self._prepared.update((statement, name) for statement, name in new.items() if statement in answered)
            if exc.sqlstate in PREPARED_IS_STALE:
                self._prepared.clear()
            raise
        self._prepared.update(new)
        return [self._rows(result) for result, statement in zip(results, prepares, strict=True) if statement is None]

    def copy_in(self, copies: Sequence[Copy], *after: LiteralString) -> PQGen[None]:
        """Execute COPY FROM STDIN statements, at least one, each with its data, and then the statements ``after``.

        They are one query: its first error ends it, and PostgreSQL begins the next statement without a round trip. The
        data of a COPY are joined while PostgreSQL executes the one before.
        """
        pgconn = self.pgconn
        joined = (b"".join(parts) for _, parts in copies)
        data = next(joined)
        pgconn.send_query("; ".join([*(statement for statement, _ in copies), *after]).encode())
        yield from self._flush()
        for _ in copies:
            yield from self._copy_results()
            for start in range(0, len(data), _COPY_BYTES):
                yield from generators.copy_to(pgconn, data[start : start + _COPY_BYTES], flush=False)
            while pgconn.put_copy_end() == 0:
                yield Wait.W
            yield from self._flush()
            data = next(joined, b"")
        yield from self._copy_results()

    def _copy_results(self) -> PQGen[None]:
        """Wait until the next COPY begins, or until the query has ended. Raise its error."""
        for result in (yield from generators.fetch_many(self.pgconn)):
            if result.status not in {ExecStatus.COPY_IN, ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK}:
                raise error_from_result(result)

    def _flush(self) -> PQGen[None]:
        """Send everything. Read meanwhile, so that neither side waits for the other."""
        while self.pgconn.flush():
            if (yield Wait.RW) == Ready.R:
                self.pgconn.consume_input()

    def _collect_results(self, results: list[PGresult]) -> PQGen[None]:
        """Append all results of a pipeline, or those before its first error, and raise that."""
        pgconn = self.pgconn
        error: psycopg.Error | None = None
        try:
            yield from self._flush()
            while True:
                while pgconn.is_busy():
                    yield Wait.R
                    pgconn.consume_input()
                result = pgconn.get_result()
                if result is None:
                    if pgconn.status != ConnStatus.OK:
                        break
                elif result.status == ExecStatus.PIPELINE_SYNC:
                    pgconn.exit_pipeline_mode()
                    break
                elif result.status in {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}:
                    results.append(result)
                elif result.status != ExecStatus.PIPELINE_ABORTED:
                    error = error or error_from_result(result)
        except psycopg.OperationalError as exc:
            # The last error of the server has more information than the end of the connection.
            raise error or exc from None
        if error is not None:
            raise error

    def _dump(self, values: Sequence[object]) -> Sequence[Buffer | None] | None:
        return self._transformer.dump_sequence(values, [PyFormat.TEXT] * len(values)) if values else None

    def _rows(self, result: PGresult) -> list[Row]:
        self._transformer.set_pgresult(result)
        return self._transformer.load_rows(0, result.ntuples, tuple)
