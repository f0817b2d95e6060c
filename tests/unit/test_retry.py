"""The action for each SQLSTATE, and the waits between attempts."""

from __future__ import annotations

import inspect
import re
from random import Random

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import errors

from orderlib.ingestion.retry import SQLSTATE_ACTIONS, Backoff, ErrorAction, classify_sqlstate
from sandbox.postgres import INSTALLATION


@pytest.mark.parametrize(
    ("sqlstate", "action"),
    [
        ("08006", ErrorAction.OUTAGE),  # connection failure
        ("22001", ErrorAction.BISECT),  # string too long
        ("22P05", ErrorAction.BISECT),  # untranslatable character
        ("23505", ErrorAction.BISECT),  # unique violation
        ("23514", ErrorAction.BISECT),  # check violation
        ("25006", ErrorAction.OUTAGE),  # read-only transaction
        ("25P03", ErrorAction.OUTAGE),  # idle_in_transaction_session_timeout
        ("25P04", ErrorAction.OUTAGE),  # transaction_timeout
        ("25P02", ErrorAction.OUTAGE),  # an earlier statement failed, at a worker of Citus
        ("28P01", ErrorAction.STOP),  # wrong password
        ("3D000", ErrorAction.STOP),  # no such database
        ("40001", ErrorAction.RETRY),  # serialization failure
        ("40P01", ErrorAction.RETRY),  # deadlock
        ("42501", ErrorAction.STOP),  # no such privilege
        ("42P01", ErrorAction.STOP),  # no such table
        ("53100", ErrorAction.OUTAGE),  # disk full
        ("53300", ErrorAction.OUTAGE),  # too many connections
        ("54000", ErrorAction.BISECT),  # row too large for an index
        ("54001", ErrorAction.STOP),  # statement too complex
        ("55P03", ErrorAction.OUTAGE),  # lock not available
        ("57P01", ErrorAction.OUTAGE),  # terminated by an administrator
        ("57014", ErrorAction.OUTAGE),  # cancelled
        ("57P05", ErrorAction.OUTAGE),  # idle_session_timeout
        ("58030", ErrorAction.OUTAGE),  # the server's disk
        ("XX000", ErrorAction.BISECT),
        ("XX001", ErrorAction.STOP),  # data corrupted
        ("P0001", ErrorAction.STOP),  # raised by a trigger
        ("ZZZZZ", ErrorAction.STOP),
        ("", ErrorAction.STOP),
    ],
)
def test_each_sqlstate_has_its_action(sqlstate: str, action: ErrorAction) -> None:
    assert classify_sqlstate(sqlstate) is action


@given(st.text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=5, max_size=5))
def test_unknown_sqlstates_are_neither_split_nor_retried(sqlstate: str) -> None:
    known = ("08", "22", "23", "25006", "25P02", "25P03", "25P04", "40", "53", "54000", "55", "57", "58", "72", "XX000")
    if not sqlstate.startswith(known):
        assert classify_sqlstate(sqlstate) is ErrorAction.STOP


def test_every_class_of_sqlstates_has_an_entry() -> None:
    codes = {
        kind.sqlstate
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, psycopg.Error) and isinstance(kind.sqlstate, str)
    }
    # psycopg's list is that of its PostgreSQL; the server's own list may be newer.
    for line in (INSTALLATION / "share" / "errcodes.txt").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"([0-9A-Z]{5}) +[EWS] ", line):
            codes.add(found[1])
    assert len(codes) > 200
    assert {code[:2] for code in codes} == {entry for entry in SQLSTATE_ACTIONS if len(entry) == 2}
    assert {entry for entry in SQLSTATE_ACTIONS if len(entry) == 5} <= codes


@given(st.integers(0, 2**32), st.floats(0.01, 5), st.floats(5, 100))
def test_waits_double_up_to_a_bound_and_are_at_least_half_of_it(seed: int, first_s: float, max_s: float) -> None:
    backoff = Backoff(Random(seed), first_s=first_s, max_s=max_s)
    for tries in range(40):
        bound = min(max_s, first_s * 2**tries)
        assert bound / 2 <= backoff.next_wait_s() <= bound


def test_waits_differ_between_programs_and_are_short_again_after_a_success() -> None:
    one, other = Backoff(Random(1)), Backoff(Random(2))
    assert [one.next_wait_s() for _ in range(8)] != [other.next_wait_s() for _ in range(8)]
    one.reset()
    assert one.next_wait_s() <= one.first_s
