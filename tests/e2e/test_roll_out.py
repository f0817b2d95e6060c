"""The roll-out of a release with new fields, beside programs of this release; and of one with a relaxed rule."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orderlib import content_sha256, decode_order, encode_order
from orderlib.testing import SAMPLE
from tests.support.api_process import Service, serving
from tests.support.databases import Database
from tests.support.programs import events, run, running, succeed
from tests.support.project_copy import copy_project, diff_in_contributing
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(300)

#: A rule that an order could break before, and its migration.
RELAXED = """
--- a/orderlib/models.py
+++ b/orderlib/models.py
@@
-    locale: Annotated[str, text(1, 35)]
+    locale: Annotated[str, text(1, 64)]
--- /dev/null
+++ b/orderlib/postgres/migrations/NNNN_longer_locale.sql
@@
+ALTER TABLE orders DROP CONSTRAINT orders_locale_check;
+ALTER TABLE orders ADD CONSTRAINT orders_locale_check CHECK (char_length(locale) BETWEEN 1 AND 64) NOT VALID;
"""


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release with the new fields of CONTRIBUTING.md."""
    return copy_project(tmp_path_factory.mktemp("new_fields"), diff_in_contributing())


def plain_order(uid: str, **fields: object) -> dict[str, Any]:
    """Return the sample with another order_uid, as canonical JSON has it; further fields are new ones."""
    return {**json.loads(encode_order(decode_order(SAMPLE))), "order_uid": uid, **fields}


def with_new_fields(uid: str, note: str = "Happy birthday") -> dict[str, Any]:
    order = plain_order(uid, gift_note=note)
    order["payment"]["points"] = 70
    order["items"][0]["unit"] = "box"
    return order


def send(environ: Mapping[str, str], *orders: dict[str, Any]) -> dict[str, bytes]:
    """Send orders, and return their values by order_uid."""
    values = {order["order_uid"]: json.dumps(order).encode() for order in orders}
    succeed("sender --any --file -", environ, stdin=b"\n".join(values.values()))
    return values


def known(value: bytes) -> dict[str, Any]:
    """Return what this release knows of an order."""
    plain: dict[str, Any] = json.loads(encode_order(decode_order(value)))
    return plain


def stored(release: Path, environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return all orders as a release reads them, by order_uid."""
    exported = map(json.loads, succeed("admin export", environ, checkout=release).splitlines())
    return {order["order_uid"]: order for order in exported}


def assert_holds(release: Path, environ: Mapping[str, str], *not_proved: str) -> None:
    """``reconcile`` finds nothing wrong, and names exactly these kinds of what it cannot prove."""
    result = json.loads(succeed("admin reconcile --json", environ, checkout=release))
    assert sorted(kind["what"] for kind in result["not_proved"]) == sorted(not_proved)


def backfill(release: Path, environ: Mapping[str, str], status: int = 0) -> dict[str, Any]:
    done = run("admin backfill --json", environ, checkout=release)
    assert done.returncode == status, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def etag(api: Service, uid: str) -> str:
    return str(api.get(f"/orders/{uid}").headers["ETag"])


def test_an_old_consumer_with_a_new_api_loses_no_value_and_a_backfill_shows_them(
    new: Path, environ: dict[str, str]
) -> None:
    succeed("admin migrate", environ, checkout=new)
    sent = send(
        environ,
        plain_order("without"),
        with_new_fields("with"),
        plain_order("explicit-default", gift_note=""),
        {**with_new_fields("others-too"), "campaign": {"name": "spring"}},
        plain_order("invalid", gift_note=5),
    )
    succeed("consumer --exit-at-end", environ)
    to_backfill = "originals with fields that an earlier release did not know: run `admin backfill`"
    only_earlier = "originals that only the rules of an earlier release accept"
    assert_holds(new, environ, to_backfill, only_earlier)
    with serving(environ, new) as api:
        for uid, value in sent.items():
            assert api.get(f"/orders/{uid}").json == known(value)
            if uid != "without":
                assert api.get(f"/orders/{uid}?format=original").body == value
        before = {uid: etag(api, uid) for uid in sent}
        first = backfill(new, environ, status=1)
        assert (first["originals"], first["stored"], first["duplicate"]) == (4, 3, 0)
        assert first["rejected_originals"] == [{"order_uid": "invalid", "code": "invalid_order", "path": "$.gift_note"}]

        unchanged = {"without", "invalid"}
        for uid in sent:
            answer = api.get(f"/orders/{uid}", {"If-None-Match": before[uid]})
            assert answer.status == (304 if uid in unchanged else 200)
        assert api.get("/orders/with").json == json.loads(sent["with"])
        assert api.get("/orders/explicit-default").json == known(sent["explicit-default"])
        assert api.get("/orders/others-too").json == with_new_fields("others-too")
        assert api.get("/orders/others-too?format=original").body == sent["others-too"]
        assert api.get("/orders/with?format=original").status == 404
        before = {uid: etag(api, uid) for uid in sent}
        second = backfill(new, environ, status=1)
        assert (second["originals"], second["stored"], second["duplicate"]) == (2, 0, 1)
        assert {uid: etag(api, uid) for uid in sent} == before
    assert_holds(new, environ, only_earlier)


def test_a_rewind_with_a_new_consumer_stores_what_a_release_dropped_that_ignored_unknown_fields(
    new: Path, environ: dict[str, str], database: Database
) -> None:
    first = send(environ, plain_order("without"), with_new_fields("changed", "first"), with_new_fields("with"))
    last = {**first, **send(environ, with_new_fields("changed", "last"))}
    succeed("consumer --exit-at-end", environ)
    with psycopg.connect(database.superuser_url) as superuser:
        superuser.execute("UPDATE orders SET has_original = false")
        for uid, value in last.items():
            superuser.execute(
                "UPDATE orders SET content_sha256 = %s WHERE order_uid = %s",
                [content_sha256(decode_order(value)), uid],
            )
        superuser.execute("DELETE FROM order_originals")
    succeed("admin migrate", environ, checkout=new)
    dropped = "stored by an earlier release without the unknown fields of its record: a rewind stores them"
    assert_holds(new, environ, dropped)
    assert backfill(new, environ)["originals"] == 0

    def rewind() -> list[tuple[str, int]]:
        succeed("admin offsets reset --to-earliest --execute --yes", environ, checkout=new)
        succeed("consumer --exit-at-end", environ, checkout=new)
        assert stored(new, environ) == {uid: json.loads(value) for uid, value in last.items()}
        assert_holds(new, environ)
        with psycopg.connect(database.superuser_url) as superuser:
            rows = superuser.execute("SELECT order_uid, version FROM orders WHERE order_uid <> 'changed' ORDER BY 1")
            return rows.fetchall()

    assert rewind() == [("with", 2), ("without", 1)]
    assert rewind() == [("with", 2), ("without", 1)]


def test_both_consumers_and_an_old_api_work_together(
    new: Path, environ: dict[str, str], tmp_path: Path, database: Database
) -> None:
    succeed("admin migrate", environ, checkout=new)
    orders = [with_new_fields(f"o{number}", "first") for number in range(60)]

    def partitions(log: Path) -> int:
        assigned = [event for event in events(log.read_text()) if event["event"] == "partitions_assigned"]
        return sum(len(event["next_offsets"]) for event in assigned)

    def wait_until_stored(note: str) -> None:
        columns, needed = "gift_note, convert_from(coalesce(value, ''), 'UTF8')", f"%{note}%"
        query = (
            f"SELECT count(*) FROM orders LEFT JOIN order_originals USING (order_uid) WHERE concat({columns}) LIKE %s"
        )
        with psycopg.connect(database.superuser_url, autocommit=True) as superuser:
            wait_for(lambda: superuser.execute(query.encode(), [needed]).fetchall() == [(len(orders),)])

    with serving(environ) as old_api, ExitStack() as consumers:
        consumers.enter_context(running("consumer", environ, tmp_path / "old"))
        wait_for(lambda: partitions(tmp_path / "old") == 3)
        with running("consumer", environ, tmp_path / "new", checkout=new) as new_consumer:
            wait_for(lambda: partitions(tmp_path / "new") > 0)
            sent = send(environ, *orders)
            wait_until_stored("first")
            with psycopg.connect(database.superuser_url) as superuser:
                [(originals,)] = superuser.execute("SELECT count(*) FROM order_originals").fetchall()
            assert 0 < originals < len(orders)
            for uid, value in sent.items():
                answer = old_api.get(f"/orders/{uid}")
                assert answer.json == known(value)
                again = old_api.get(f"/orders/{uid}", {"If-None-Match": str(answer.headers["ETag"])})
                assert again.status == 304
            new_consumer.terminate()
            assert new_consumer.wait(15) == 0
        # The old consumer replaces the versions of the new one.
        sent = send(environ, *(with_new_fields(order["order_uid"], "last") for order in orders))
        wait_until_stored("last")
    assert backfill(new, environ)["stored"] == len(orders)
    assert backfill(new, environ)["originals"] == 0
    assert stored(new, environ) == {uid: json.loads(value) for uid, value in sent.items()}
    assert_holds(new, environ)


def test_a_relaxed_rule_stores_earlier_rejects_by_a_redrive(tmp_path: Path, environ: dict[str, str]) -> None:
    relaxed = copy_project(tmp_path, RELAXED)
    long = "x" * 50
    send(environ, {**plain_order("new"), "locale": long}, plain_order("replaced"), plain_order("later"))
    send(environ, {**plain_order("replaced"), "locale": long}, {**plain_order("later"), "locale": long})
    send(environ, plain_order("later", entry="newest"), {**plain_order("too-long"), "locale": "x" * 65})
    succeed("consumer --exit-at-end", environ)

    succeed("admin migrate", environ, checkout=relaxed)
    redriven = succeed("admin rejects redrive --code invalid_order --json", environ, checkout=relaxed)
    [outcomes] = json.loads(redriven)
    assert {name: count for name, count in outcomes.items() if count} == {"stored": 2, "superseded": 1, "rejected": 1}
    orders = stored(relaxed, environ)
    assert {uid: order["locale"] == long for uid, order in orders.items()} == {
        "new": True,
        "replaced": True,
        "later": False,
    }
    assert_holds(relaxed, environ, "rejects that only the rules of an earlier release reject")
    [again] = json.loads(succeed("admin rejects redrive --code invalid_order --json", environ, checkout=relaxed))
    assert {name: count for name, count in again.items() if count} == {"rejected": 1}
    assert stored(relaxed, environ) == orders
