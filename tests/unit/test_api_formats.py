"""The format of money, times and counts on the pages."""

from __future__ import annotations

import datetime as dt

import pytest

from services.api.pages import ago, counted, duration, machine_time, moment, money, shortened


@pytest.mark.parametrize(
    ("minor_units", "currency", "written"),
    [
        (1817, "USD", "18.17 USD"),
        (5, "EUR", "0.05 EUR"),
        (0, "RUB", "0.00 RUB"),
        (1234567, "JPY", "1,234,567 JPY"),
        (1234567, "KWD", "1,234.567 KWD"),
        (7, "BHD", "0.007 BHD"),
        (12345, "CLF", "1.2345 CLF"),
        (100, "ZZZ", "1.00 ZZZ"),
        (2**63 - 1, "USD", "92,233,720,368,547,758.07 USD"),
    ],
)
def test_money_has_the_decimals_of_its_currency(minor_units: int, currency: str, written: str) -> None:
    assert money(minor_units, currency).replace("\N{NO-BREAK SPACE}", " ") == written


@pytest.mark.parametrize(
    ("time", "written", "machine"),
    [
        (1637907727, "26 Nov 2021, 06:22:07 UTC", "2021-11-26T06:22:07Z"),
        (0, "1 Jan 1970, 00:00:00 UTC", "1970-01-01T00:00:00Z"),
        (253402300799, "31 Dec 9999, 23:59:59 UTC", "9999-12-31T23:59:59Z"),
        (dt.datetime.fromisoformat("2021-11-26T01:22:19+05:00"), "25 Nov 2021, 20:22:19 UTC", "2021-11-25T20:22:19Z"),
        (dt.datetime(1, 1, 1, tzinfo=dt.UTC), "1 Jan 0001, 00:00:00 UTC", "0001-01-01T00:00:00Z"),
    ],
)
def test_a_time_is_shown_in_utc(time: dt.datetime | int, written: str, machine: str) -> None:
    assert moment(time) == written
    assert machine_time(time) == machine


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(-3, "0 s"), (0, "0 s"), (119.9, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (200_000, "2 days")],
)
def test_a_duration_has_one_unit(seconds: float, written: str) -> None:
    assert duration(dt.timedelta(seconds=seconds)) == written


def test_a_count_at_its_limit_says_or_more() -> None:
    assert counted(9_999) == "9,999"
    assert counted(10_000) == "10,000 or more"


def test_a_list_shows_the_age_of_a_day_and_then_the_date() -> None:
    now = dt.datetime(2026, 3, 2, 12, tzinfo=dt.UTC)
    assert ago(now - dt.timedelta(seconds=12), now) == "12 s ago"
    assert ago(now - dt.timedelta(hours=23, minutes=59), now) == "23 h ago"
    assert ago(now - dt.timedelta(days=1), now) == "1 Mar 2026"
    assert ago(now + dt.timedelta(seconds=1), now) == "0 s ago"


def test_a_long_text_is_shortened_in_its_middle() -> None:
    assert shortened("x" * 40) == "x" * 40
    assert shortened("a" * 31 + "b" * 100 + "c" * 8) == "a" * 31 + "…" + "c" * 8


def test_a_uuid_is_not_shortened() -> None:
    uuid = "123e4567-e89b-12d3-a456-426614174000"
    assert shortened(uuid) == uuid
