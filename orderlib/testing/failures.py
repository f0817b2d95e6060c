"""Failures of the repositories in memory: which calls fail, and with which error."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self, get_args

import attrs

from orderlib.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    OrderlibError,
    RefusedByDatabase,
    TransactionConflict,
)

#: The methods of a repository that can fail.
Method = Literal[
    "get",
    "get_stored",
    "get_many",
    "content_sha256",
    "original",
    "list_orders",
    "count",
    "find",
    "stream",
    "position_state",
    "wait_until_handled",
    "stats",
    "check",
    "save",
    "save_many",
]

METHODS: tuple[Method, ...] = get_args(Method)
WRITES: tuple[Method, ...] = ("save", "save_many")

#: An error of each class, as PostgreSQL's repositories raise it.
_ERRORS: dict[type[OrderlibError], OrderlibError] = {
    type(error): error
    for error in (
        DatabaseUnavailable("PostgreSQL at 127.0.0.1:5432: Connection refused"),
        TransactionConflict("PostgreSQL: deadlock detected (40P01)"),
        RefusedByDatabase("23514"),
        ConfigurationError("PostgreSQL: permission denied for table orders (42501)"),
    )
}

#: What a repository raises if the connection is lost while it waits for the answer to COMMIT.
ANSWER_LOST = DatabaseUnavailable(
    "PostgreSQL: the connection was lost; whether the orders are stored is unknown; saving them again is safe"
)


@attrs.define(eq=False)
class _Rule:
    """Which calls fail, and how."""

    error: OrderlibError
    methods: Sequence[str]
    #: The only call that fails; ``None``: every call.
    call: int | None
    #: Whether the call takes effect before it fails.
    takes_effect: bool
    calls: int = 0
    failed: int = 0
    is_ended: bool = False


@attrs.frozen(eq=False, repr=False)
class Failure:
    """Calls that fail. ``fail`` and ``lose_answer`` of a repository return it.

    In a ``with`` statement, the calls fail until the end of its block.
    """

    _rule: _Rule

    @property
    def count(self) -> int:
        """How many calls have failed."""
        return self._rule.failed

    def end(self) -> None:
        """Let later calls succeed."""
        self._rule.is_ended = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Failures:
    """The failures of one repository. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._rules: list[_Rule] = []

    def add(
        self,
        methods: Sequence[str],
        error: OrderlibError | type[OrderlibError],
        call: int | None,
        *,
        takes_effect: bool = False,
    ) -> Failure:
        """Add a failure. Raises TypeError or ValueError for arguments that fit no call."""
        if unknown := set(methods) - set(METHODS):
            raise ValueError(f"a repository has no method {min(unknown)!r} that can fail")
        if call is not None and (type(call) is not int or call < 1):
            raise ValueError("call must be an integer from 1: the next call is 1")
        if isinstance(error, type):
            if error not in _ERRORS:
                raise TypeError(f"with_ must be an error, not the class {error.__name__}, which needs arguments")
            error = _ERRORS[error]
        rule = _Rule(error, methods or METHODS, call, takes_effect)
        with self._lock:
            self._rules.append(rule)
        return Failure(rule)

    def before_call(self, method: Method) -> OrderlibError | None:
        """Count a call. Raise its error if it fails, or return the error to raise after it took effect."""
        due: _Rule | None = None
        with self._lock:
            for rule in self._rules:
                if rule.is_ended or method not in rule.methods:
                    continue
                rule.calls += 1
                if due is None and rule.call in {None, rule.calls}:
                    due = rule
                    rule.failed += 1
        if due is None:
            return None
        # A copy, because an error keeps the traceback of each time that it is raised.
        error = copy.copy(due.error)
        if not due.takes_effect:
            raise error
        return error
