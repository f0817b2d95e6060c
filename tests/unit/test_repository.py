"""Cursors: opaque to the world, exact to us. White space around the text of a search."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orderlib import Cursor, InvalidQuery
from orderlib.contract import within_utc_years
from orderlib.search import SearchText
from tests.unit.test_contract import SAMPLE_ORDER

UTC_TIMES = st.datetimes(timezones=st.just(dt.UTC))


@given(UTC_TIMES, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=130))
def test_a_cursor_is_read_back_as_it_was_written(first_stored_at: dt.datetime, order_uid: str) -> None:
    cursor = Cursor(first_stored_at=first_stored_at, order_uid=order_uid)
    assert Cursor.parse(str(cursor)) == cursor
    # It goes into a URL as it is.
    assert str(cursor).isascii()
    assert str(cursor).replace("-", "").replace("_", "").isalnum()


@given(st.datetimes(timezones=st.timezones()).filter(within_utc_years))
def test_the_same_place_has_the_same_cursor_in_every_time_zone(moment: dt.datetime) -> None:
    cursors = [Cursor(first_stored_at=time, order_uid="a") for time in (moment, moment.astimezone(dt.UTC))]
    assert str(cursors[0]) == str(cursors[1])


def written(plain: bytes) -> str:
    return base64.urlsafe_b64encode(plain).decode().rstrip("=")


GOOD = str(Cursor(first_stored_at=SAMPLE_ORDER.date_created, order_uid="b563"))

GARBAGE = {
    "nothing": "",
    "a word": "next",
    "blanks around it": f" {GOOD}",
    "padded": GOOD + "=" * (-len(GOOD) % 4 or 4),
    "something after it": GOOD + "AAAA",
    "not base64": "%%%%",
    "not ASCII": "é" * 4,
    "a lone surrogate": "\ud800",
    "not UTF-8": written(b"\xff\xff"),
    "no time": written(b"b563"),
    "a time that is none": written(b"2021-13-01T00:00:00+00:00 b563"),
    "a time without an offset": written(b"2021-11-26T06:22:19 b563"),
    "a time in another zone": written(b"2021-11-26T06:22:19+01:00 b563"),
    "a time spelt otherwise": written(b"2021-11-26T06:22:19Z b563"),
    "year 0 by way of an offset": written(b"0001-01-01T00:00:00+14:00 b563"),
    "a NUL": written(b"2021-11-26T06:22:19+00:00 b\x00"),
    "a million letters": "A" * 1_000_000,
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidQuery) as refusal:
        Cursor.parse(text)
    assert str(refusal.value) == "cursor: expected a next_cursor as it was returned"


def test_a_cursor_of_other_types_is_refused_without_its_value() -> None:
    wrong: list[Any] = [None, 5, b"SECRET"]
    for value in wrong:
        kind = type(value).__name__
        with pytest.raises(TypeError, match=f"first_stored_at must be a datetime, not {kind}$"):
            Cursor(first_stored_at=value, order_uid="a")
        with pytest.raises(TypeError, match=f"order_uid must be a str, not {kind}$"):
            Cursor(first_stored_at=SAMPLE_ORDER.date_created, order_uid=value)
        with pytest.raises(TypeError, match=f"text must be a str, not {kind}$"):
            Cursor.parse(value)


@pytest.mark.parametrize("order_uid", ["a\0b", "\ud800"])
def test_a_cursor_is_a_place_that_every_store_can_compare(order_uid: str) -> None:
    with pytest.raises(ValueError, match="order_uid"):
        Cursor(first_stored_at=SAMPLE_ORDER.date_created, order_uid=order_uid)
    with pytest.raises(ValueError, match="offset"):
        Cursor(first_stored_at=SAMPLE_ORDER.date_created.replace(tzinfo=None), order_uid="a")


@given(st.text())
def test_any_text_is_a_cursor_or_refused(text: str) -> None:
    with contextlib.suppress(InvalidQuery):
        assert str(Cursor.parse(text)) == text


def test_all_white_space_around_a_search_is_ignored() -> None:
    for space in filter(str.isspace, map(chr, range(sys.maxunicode + 1))):
        search = SearchText.parse(f"{space}a{space} b{space}")
        assert search is not None
        assert search.text == f"a{space} b", hex(ord(space))
