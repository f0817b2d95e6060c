"""The verdict on each SQLSTATE, and the waits between tries."""

from __future__ import annotations

import inspect
import re
from random import Random

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import errors

from orderlib.retry import FATES, Backoff, Fate, fate_of
from sandbox.postgres import INSTALLATION


@pytest.mark.parametrize(
    ("sqlstate", "fate"),
    [
        ("08006", Fate.OUTAGE),  # connection failure
        ("22001", Fate.SPLIT),  # string too long
        ("22P05", Fate.SPLIT),  # untranslatable character
        ("23505", Fate.SPLIT),  # unique violation
        ("23514", Fate.SPLIT),  # check violation
        ("25006", Fate.OUTAGE),  # read-only transaction
        ("25P03", Fate.OUTAGE),  # idle_in_transaction_session_timeout
        ("25P04", Fate.OUTAGE),  # transaction_timeout
        ("25P02", Fate.STOP),  # in a failed transaction: a bug of ours
        ("28P01", Fate.STOP),  # wrong password
        ("3D000", Fate.STOP),  # no such database
        ("40001", Fate.AGAIN),  # serialization failure
        ("40P01", Fate.AGAIN),  # deadlock
        ("42501", Fate.STOP),  # no such right
        ("42P01", Fate.STOP),  # no such table
        ("53100", Fate.OUTAGE),  # disk full
        ("53300", Fate.OUTAGE),  # too many connections
        ("54000", Fate.SPLIT),  # row too large for an index
        ("54001", Fate.STOP),  # statement too complex
        ("55P03", Fate.OUTAGE),  # lock not available
        ("57P01", Fate.OUTAGE),  # terminated by an administrator
        ("57014", Fate.OUTAGE),  # cancelled
        ("57P05", Fate.OUTAGE),  # idle_session_timeout
        ("58030", Fate.OUTAGE),  # the server's disk
        ("XX000", Fate.SPLIT),
        ("XX001", Fate.STOP),  # data corrupted
        ("P0001", Fate.STOP),  # raised by somebody's trigger
        ("ZZZZZ", Fate.STOP),
        ("", Fate.STOP),
    ],
)
def test_the_sqlstate_alone_decides(sqlstate: str, fate: Fate) -> None:
    assert fate_of(sqlstate) is fate


@given(st.text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=5, max_size=5))
def test_nothing_is_split_or_tried_again_by_accident(sqlstate: str) -> None:
    known = ("08", "22", "23", "25006", "25P03", "25P04", "40", "53", "54000", "55", "57", "58", "72", "XX000")
    if not sqlstate.startswith(known):
        assert fate_of(sqlstate) is Fate.STOP


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
    assert {code[:2] for code in codes} == {entry for entry in FATES if len(entry) == 2}
    assert {entry for entry in FATES if len(entry) == 5} <= codes


@given(st.integers(0, 2**32), st.floats(0.01, 5), st.floats(5, 100))
def test_waits_double_up_to_a_bound_and_never_fall_below_its_half(seed: int, first_s: float, most_s: float) -> None:
    backoff = Backoff(Random(seed), first_s=first_s, most_s=most_s)
    for tries in range(40):
        bound = min(most_s, first_s * 2**tries)
        assert bound / 2 <= backoff.next_wait_s() <= bound


def test_waits_differ_between_programs_and_are_short_again_after_success() -> None:
    one, other = Backoff(Random(1)), Backoff(Random(2))
    assert [one.next_wait_s() for _ in range(8)] != [other.next_wait_s() for _ in range(8)]
    one.reset()
    assert one.next_wait_s() <= one.first_s
