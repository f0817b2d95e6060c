"""The list of rejects: what it shows, how it is filtered, and what it never shows."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from urllib.parse import parse_qs

import psycopg
import pytest
from psycopg.types.json import Jsonb

from orderlib.repository import encode_cursor
from tests.support.api_process import Service, serving, settings_for
from tests.support.databases import Database

FAULTS = [
    {"path": "$.payment.amount", "expected": "an integer", "found": "text"},
    {"path": "$.locale", "expected": "a string", "found": "no value"},
]
PRIVATE = "Private Person"


@pytest.fixture(scope="module")
def store(module_database: Database) -> Iterator[psycopg.Connection]:
    """Five rejects: offsets 0 to 4, each an hour later, the odd ones of another code; offset 1 was redriven."""
    with psycopg.connect(module_database.superuser_url, autocommit=True) as connection:
        for offset in range(5):
            code, faults = "malformed_json" if offset % 2 else "invalid_order", Jsonb({"total": 7, "first": FAULTS})
            connection.execute(
                "INSERT INTO rejects (topic_id, partition, record_offset, topic, record_time, key, value, headers,"
                " code, faults, rejected_at) VALUES ('id', 0, %s, 'orders', '2026-01-01T00:00:00Z', %s, %s, %s, %s, %s,"
                " timestamptz '2026-01-01T00:00:00Z' + %s * interval '1 h')",
                [
                    *(offset, PRIVATE.encode(), PRIVATE.encode(), Jsonb([{"key": PRIVATE, "value": None}])),
                    *(code, faults, offset),
                ],
            )
        connection.execute(
            "UPDATE rejects SET redriven_at = '2026-01-02T00:00:00Z', redrive_outcome = 'stored'"
            " WHERE record_offset = 1"
        )
        yield connection


@pytest.fixture(scope="module")
def api(module_database: Database, store: psycopg.Connection) -> Iterator[Service]:  # noqa: ARG001 - has the rejects
    with serving(settings_for(module_database.reader_url)) as service:
        yield service


def offsets(api: Service, query: str) -> list[int]:
    return [reject["offset"] for reject in api.get(f"/rejects?{query}").json["rejects"]]


def test_rejects_are_listed_newest_first_with_position_times_code_and_faults(api: Service) -> None:
    answer = api.get("/rejects")
    assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")
    assert [reject["offset"] for reject in answer.json["rejects"]] == [4, 3, 2, 1, 0]
    assert answer.json["rejects"][3] == {
        "topic": "orders",
        "partition": 0,
        "offset": 1,
        "topic_id": "id",
        "record_time": "2026-01-01T00:00:00Z",
        "code": "malformed_json",
        "faults": FAULTS,
        "total_faults": 7,
        "rejected_at": "2026-01-01T01:00:00Z",
        "redriven_at": "2026-01-02T00:00:00Z",
        "redrive_outcome": "stored",
    }


def test_rejects_are_filtered_by_code_and_time(api: Service) -> None:
    assert offsets(api, "code=malformed_json") == [3, 1]
    assert offsets(api, "since=2026-01-01T03:00:00Z") == [4, 3]
    assert offsets(api, "until=2026-01-01T03:00:00%2B01:00") == [1, 0]
    assert offsets(api, "code=invalid_order&since=2026-01-01T01:00:00Z&until=2026-01-01T04:00:00Z") == [2]
    assert offsets(api, "code=too_large") == []
    # PostgreSQL itself refuses offsets of 16 hours and more.
    assert offsets(api, "since=2026-01-02T02:59:00%2B23:59") == [4, 3]
    assert offsets(api, "until=2026-01-01T03:01:00-23:59&since=2026-01-01T04:00:00Z") == [4]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_following_the_cursors_shows_each_reject_once(api: Service, store: psycopg.Connection, limit: int) -> None:
    """Also if several were rejected at the same time."""
    store.execute("UPDATE rejects SET rejected_at = '2026-01-01T02:00:00Z' WHERE record_offset IN (1, 3)")
    seen: list[int] = []
    query = f"limit={limit}"
    while True:
        page = api.get(f"/rejects?{query}").json
        seen += [reject["offset"] for reject in page["rejects"]]
        if page["next_cursor"] is None:
            break
        query = f"limit={limit}&cursor={page['next_cursor']}"
    store.execute(
        "UPDATE rejects SET rejected_at = '2026-01-01T00:00:00Z'::timestamptz + record_offset * interval '1 h'"
    )
    assert seen == [4, 3, 2, 1, 0]


def test_the_link_to_older_rejects_keeps_the_filters(api: Service) -> None:
    page = api.page("/rejects?since=2026-01-01T00:00:00.25Z&until=2026-01-01T03:00:00.75Z&limit=1").text
    [older] = re.findall(r'href="/rejects\?([^"]*cursor=[^"]*)"', page)
    filters = parse_qs(html.unescape(older))
    assert (filters["since"], filters["until"]) == (
        ["2026-01-01T00:00:00.250000+00:00"],
        ["2026-01-01T03:00:00.750000+00:00"],
    )


def test_a_cursor_of_a_position_that_cannot_exist_is_an_invalid_query(api: Service) -> None:
    for position in ("-1 0", "0 -1", "-99999999999 0", "0 -99999999999999999999"):
        cursor = encode_cursor(f"2026-01-01T00:00:00+00:00 {position} id")
        assert api.get(f"/rejects?cursor={cursor}").status == 400


def test_the_page_shows_every_fault_and_explains_redrive(api: Service) -> None:
    page = api.page("/rejects?code=invalid_order").text
    for text in ("orders/0/4", "$.payment.amount", "an integer", "no value", "first 2 of 7 faults", "rejects redrive"):
        assert text in page
    assert "orders/0/3" not in page
    assert 'href="/rejects?code=malformed_json"' in page
    assert "No rejects match" in api.page("/rejects?code=too_large").text


def test_no_answer_has_the_content_of_a_record(api: Service) -> None:
    for answer in (api.get("/rejects"), api.page("/rejects"), api.get("/rejects?limit=1")):
        assert "Private" not in answer.text
