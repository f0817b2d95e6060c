"""The answers of the API over HTTP."""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import attrs
import jsonschema
import psycopg
import pytest

import orderlib
from orderlib.models import Order
from orderlib.testing import SAMPLE as SAMPLE_JSON
from tests.support.api_process import Service, serving, settings_for
from tests.support.databases import Database

SAMPLE = orderlib.decode_order(SAMPLE_JSON)
EMOJI = "\N{GRINNING FACE}"
SAMPLE_PATH = f"/orders/{SAMPLE.order_uid}"
ETAG = f'"{orderlib.content_sha256(SAMPLE).hex()}"'


def order(order_uid: str, **changed: Any) -> Order:
    return attrs.evolve(SAMPLE, order_uid=order_uid, **changed)


@pytest.fixture(scope="module")
def store(module_database: Database) -> Iterator[orderlib.PostgresOrderRepository]:
    with orderlib.connect(module_database.writer_url) as repository:
        repository.save(SAMPLE)
        yield repository


@pytest.fixture(scope="module")
def api(module_database: Database, store: object) -> Iterator[Service]:  # noqa: ARG001 - has the orders
    with serving(settings_for(module_database.reader_url)) as service:
        yield service


@pytest.fixture(scope="module")
def guarded(module_database: Database, store: object) -> Iterator[Service]:  # noqa: ARG001 - has the orders
    environ = settings_for(module_database.reader_url, ORDERS_API_TOKENS="old:secret-1,new:secret-2")
    with serving(environ) as service:
        yield service


def test_an_order_is_returned_as_it_was_sent(api: Service) -> None:
    answer = api.get(SAMPLE_PATH)
    assert answer.status == 200
    assert orderlib.decode_order(answer.body) == SAMPLE
    assert answer.body == orderlib.encode_order(SAMPLE)
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["ETag"] == f'"{hashlib.sha256(answer.body).hexdigest()}"'
    assert answer.headers["Cache-Control"] == "private, no-cache"
    assert answer.headers["Vary"] == "Accept, Authorization"


def test_an_order_is_found_by_its_uid_if_its_transaction_differs(
    api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    differing = order("differs", payment=attrs.evolve(SAMPLE.payment, transaction="another"))
    store.save(differing)
    assert orderlib.decode_order(api.get("/orders/differs").body) == differing
    assert api.get("/orders/another").status == 404


@pytest.mark.parametrize("order_uid", ["a:b", "a.b", "...", "-", "Z" * 128, "x.json"])
def test_any_order_uid_that_the_contract_allows_makes_a_url(
    api: Service, store: orderlib.PostgresOrderRepository, order_uid: str
) -> None:
    store.save(order(order_uid))
    assert json.loads(api.get(f"/orders/{order_uid}").body)["order_uid"] == order_uid


def test_head_has_the_headers_of_get_and_no_body(api: Service) -> None:
    get, head = api.get(SAMPLE_PATH), api.get(SAMPLE_PATH, method="HEAD")
    assert head.body == b""
    unlike = {"date", "x-request-id"}
    assert {n.lower(): v for n, v in get.headers.items() if n.lower() not in unlike} == {
        n.lower(): v for n, v in head.headers.items() if n.lower() not in unlike
    }


@pytest.mark.parametrize("known", [ETAG, f"W/{ETAG}", f'"other", {ETAG}', f'"a,b",{ETAG}', "*"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_client_that_has_the_current_version_gets_304(api: Service, known: str, method: str) -> None:
    answer = api.get(SAMPLE_PATH, {"If-None-Match": known}, method=method)
    assert answer.status == 304
    assert answer.body == b""
    assert answer.headers["ETag"] == ETAG
    assert answer.headers["Cache-Control"] == "private, no-cache"
    assert answer.headers["Vary"] == "Accept, Authorization"


@pytest.mark.parametrize("known", ['"other"', f"W/{ETAG[:-2]}0", "", "nonsense", '"', '"*"', '"*", "other"'])
def test_a_client_that_has_another_version_gets_the_current_one(api: Service, known: str) -> None:
    answer = api.get(SAMPLE_PATH, {"If-None-Match": known})
    assert answer.status == 200
    assert answer.headers["ETag"] == ETAG


def test_a_changed_order_has_another_etag(api: Service, store: orderlib.PostgresOrderRepository) -> None:
    store.save(order("changing", entry="before"))
    before = api.get("/orders/changing").headers["ETag"]
    store.save(order("changing", entry="after"))
    answer = api.get("/orders/changing", {"If-None-Match": before})
    assert answer.status == 200
    assert answer.json["entry"] == "after"
    assert answer.headers["ETag"] != before


def test_the_list_shows_each_order_once_newest_first(api: Service, store: orderlib.PostgresOrderRepository) -> None:
    uids = [f"listed-{n}" for n in range(7)]
    for uid in uids:
        store.save(order(uid, customer_id="listed"))
    seen: list[str] = []
    path = "/orders?customer_id=listed&limit=3"
    cursor = ""
    for expected in (3, 3, 1):
        answer = api.get(path + cursor)
        assert answer.status == 200
        assert len(answer.json["orders"]) == expected
        seen += [listed["order_uid"] for listed in answer.json["orders"]]
        cursor = f"&cursor={answer.json['next_cursor']}"
        # An update does not move the order.
        store.save(order(uids[3], customer_id="listed", entry=f"updated after {len(seen)}"))
    assert seen == uids[::-1]
    assert cursor == "&cursor=None"


def test_the_list_has_orders_as_they_were_sent(api: Service, store: orderlib.PostgresOrderRepository) -> None:
    whole = order("in-list", customer_id="in-list", items=[*SAMPLE.items, *SAMPLE.items])
    store.save(whole)
    answer = api.get("/orders?customer_id=in-list")
    assert answer.body == b'{"orders":[%b],"next_cursor":null}' % orderlib.encode_order(whole)
    assert answer.headers["Cache-Control"] == "private, no-cache"


def test_meta_adds_times_version_and_position_and_says_whether_the_order_has_more_fields(
    api: Service, store: orderlib.PostgresOrderRepository, module_database: Database
) -> None:
    saved = order("with-meta")
    store.save(saved)
    store.save(saved, original=orderlib.encode_order(saved)[:-1] + b',"later":1}')
    plain = json.loads(orderlib.encode_order(saved))
    path = "/orders/with-meta?meta=1"
    first = api.get(path)
    stored = store.get_stored("with-meta")
    assert first.json == {
        **plain,
        "meta": {
            "first_stored_at": stored.first_stored_at.isoformat().replace("+00:00", "Z"),
            "stored_at": stored.stored_at.isoformat().replace("+00:00", "Z"),
            "version": 2,
            "has_original": True,
            "position": None,
        },
    }
    assert first.json in api.get("/orders?meta=1&limit=100").json["orders"]
    assert plain in api.get("/orders?limit=100").json["orders"]
    known = {"If-None-Match": first.headers["ETag"]}
    assert api.get(path, known).status == 304
    assert api.get("/orders/with-meta", known).status == 200

    # A duplicate moves the position only.
    with psycopg.connect(module_database.superuser_url) as superuser:
        superuser.execute(
            "UPDATE orders SET source_topic_id = 'id', source_partition = 3, source_offset = 9007199254740992,"
            " source_time = now() WHERE order_uid = 'with-meta'"
        )
    moved = api.get(path, known)
    assert moved.json["meta"]["position"] == {"topic_id": "id", "partition": 3, "offset": 2**53}
    assert moved.status == 200


def test_filters_are_exact_and_an_order_must_match_both(api: Service, store: orderlib.PostgresOrderRepository) -> None:
    for uid, customer, track in [("f1", "Ann", "T1"), ("f2", "Ann", "T2"), ("f3", "ann", "T1"), ("f4", "Ann ", "T1")]:
        store.save(order(uid, customer_id=customer, track_number=track))

    def found(query: str) -> set[str]:
        return {listed["order_uid"] for listed in api.get(f"/orders?{query}").json["orders"]}

    assert found("customer_id=Ann") == {"f1", "f2"}
    assert found("customer_id=Ann%20") == {"f4"}
    assert found("track_number=T1") == {"f1", "f3", "f4"}
    assert found("customer_id=Ann&track_number=T1") == {"f1"}
    assert found("customer_id=An%25") == set()


def test_a_period_selects_by_the_first_time_that_an_order_was_stored(
    api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    for uid in ("p1", "p2", "p3"):
        store.save(order(uid, customer_id="period"))
    store.save(order("p1", customer_id="period", entry="changed"))
    since, until = (
        store.get_stored(uid).first_stored_at.astimezone(dt.timezone(dt.timedelta(hours=3))).isoformat()
        for uid in ("p2", "p3")
    )

    def found(**period: str) -> list[str]:
        answer = api.get(f"/orders?{urlencode({'customer_id': 'period', **period})}")
        return [listed["order_uid"] for listed in answer.json["orders"]]

    assert found(since=since) == ["p3", "p2"]
    assert found(until=until) == ["p2", "p1"]
    assert found(since=since, until=until) == ["p2"]


@pytest.mark.parametrize(
    "query",
    [
        *("limit=0", "limit=101", "limit=-1", "limit=1.0", "limit=ten", "limit=1&limit=2", "limit=%D9%A1"),
        *("cursor=nonsense", "cursor=MjAyNi0wMS0wMQ", "cursor=a&cursor=b"),
        # 2026-01-01T00:00:00+00:00 and an order_uid with U+0000.
        "cursor=" + base64.urlsafe_b64encode(b"2026-01-01T00:00:00+00:00 a\0b").decode().rstrip("="),
        *(f"customer_id={'x' * 256}", "track_number=%00", "customer_id=a&customer_id=b"),
        # If these were ignored, the list would show the orders of all customers.
        *("customer_id=", "track_number", "custmer_id=a"),
        # A plus sign in a query means a blank.
        *(
            "since=",
            "since=yesterday",
            "until=2026-01-31T12:00:00",
            "since=2026-01-31T12:00:00+00:00",
            "meta=0",
            "meta=",
        ),
    ],
)
def test_a_bad_parameter_is_named(api: Service, query: str) -> None:
    answer = api.get(f"/orders?{query}")
    assert answer.status == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json["detail"].startswith(query.partition("=")[0] + ":")
    assert "nonsense" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/orders/nobody", {}, 404),
        ("GET", "/orders/%00", {}, 404),
        ("GET", "/orders/" + "x" * 5000, {}, None),
        ("GET", "/no/such/thing", {}, 404),
        ("POST", "/orders", {}, 405),
        ("DELETE", SAMPLE_PATH, {}, 405),
        ("BREW", SAMPLE_PATH, {}, None),
        ("GET", SAMPLE_PATH, {"Accept": "image/png"}, 406),
        ("GET", "/orders", {"Accept": "text/csv"}, 406),
        ("GET", "/orders?limit=none", {}, 400),
        ("GET", "/orders", {"Host": "orders.example"}, 421),
    ],
)
def test_every_error_of_the_application_is_a_problem(
    api: Service, method: str, path: str, headers: dict[str, str], status: int | None
) -> None:
    answer = api.get(path, headers, method=method)
    assert 400 <= answer.status < 500
    if status is not None:
        assert answer.status == status
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert answer.json["status"] == status
        assert answer.json["request_id"] == answer.headers["X-Request-Id"]
        assert answer.headers["Cache-Control"] == "no-store"


def test_a_browser_gets_the_same_errors_as_pages(api: Service) -> None:
    for path, status in [("/orders/nobody", 404), ("/nowhere", 404), ("/orders?limit=0", 400)]:
        answer = api.page(path)
        assert answer.status == status
        assert answer.headers["Content-Type"].startswith("text/html")
        assert "<form" in answer.text


def test_a_browser_gets_pages_and_a_program_json(api: Service) -> None:
    for path in (SAMPLE_PATH, "/orders"):
        page = api.page(path)
        assert page.headers["Content-Type"].startswith("text/html")
        assert page.headers["Cache-Control"] == "no-store"
        assert "ETag" not in page.headers
        for accept in (
            {},
            {"Accept": "*/*"},
            {"Accept": "application/json"},
            {"Accept": "application/*, text/html;q=0.5"},
        ):
            assert api.get(path, accept).headers["Content-Type"] == "application/json"


def test_raw_json_for_a_browser_is_what_a_program_gets(api: Service) -> None:
    answer = api.page(f"{SAMPLE_PATH}?format=json")
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.body == api.get(SAMPLE_PATH).body


def test_media_types_ignore_case(api: Service) -> None:
    assert api.get(SAMPLE_PATH, {"Accept": "Text/HTML"}).headers["Content-Type"].startswith("text/html")


def test_a_websocket_handshake_is_answered_as_plain_http(guarded: Service) -> None:
    upgrade = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode(),
    }
    assert guarded.get("/orders", upgrade).status == 401
    assert guarded.get("/orders", {**upgrade, **bearer("secret-1")}).status == 200
    assert [event for event in guarded.events() if event["level"] == "error"] == []


def test_a_request_keeps_its_id(api: Service) -> None:
    assert api.get("/livez", {"X-Request-Id": "abc-123"}).headers["X-Request-Id"] == "abc-123"
    made = {api.get("/livez", {"X-Request-Id": bad}).headers["X-Request-Id"] for bad in ("", "a b", "x" * 65)}
    assert len(made) == 3
    assert all(len(request_id) == 32 for request_id in made)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.mark.parametrize("path", ["/", "/orders", SAMPLE_PATH, "/orders/nobody", "/nowhere", "/static/style.css"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer("secret-"),
        basic("secret-1", "x"),
        {"Authorization": "Basic %"},
        {"Authorization": "secret-1"},
    ],
)
def test_without_a_known_token_no_order_is_shown(guarded: Service, path: str, headers: dict[str, str]) -> None:
    answer = guarded.get(path, headers)
    assert answer.status == 401
    assert "Bearer" in answer.headers["WWW-Authenticate"]
    assert "Basic" in answer.headers["WWW-Authenticate"]
    assert SAMPLE.delivery.name not in answer.text


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        (bearer("secret-1"), "old"),
        (bearer("secret-2"), "new"),
        (basic("anybody", "secret-2"), "new"),
        (basic("", "secret-1"), "old"),
        (bearer(" secret-1 "), "old"),
        (basic("", " secret-1 "), "old"),
    ],
)
def test_each_known_token_is_accepted_and_logged_by_name(guarded: Service, headers: dict[str, str], name: str) -> None:
    answer = guarded.get(SAMPLE_PATH, headers)
    assert answer.status == 200
    assert guarded.line_of(answer)["token_name"] == name


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/openapi.json"])
def test_health_and_description_are_open(guarded: Service, path: str) -> None:
    assert guarded.get(path).status == 200
    assert guarded.get(path, {"Host": "anything.example"}).status == 200


def test_with_tokens_any_host_is_served(guarded: Service) -> None:
    assert guarded.get(SAMPLE_PATH, {**bearer("secret-1"), "Host": "orders.example"}).status == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8080"])
def test_without_tokens_localhost_is_served(api: Service, host: str) -> None:
    assert api.get(SAMPLE_PATH, {"Host": host}).status == 200


@pytest.mark.parametrize("host", ["orders.example", "localhost.example", "127.0.0.1.example:80", "", "10.0.0.1"])
def test_without_tokens_no_other_host_is_served(api: Service, host: str) -> None:
    """Otherwise a website could read orders in a visitor's browser through DNS rebinding."""
    answer = api.get(SAMPLE_PATH, {"Host": host})
    assert answer.status in (400, 421)
    assert SAMPLE.delivery.name not in answer.text


@pytest.mark.parametrize(
    "path", ["/", SAMPLE_PATH, "/orders", "/orders/nobody", "/nowhere", "/static/style.css", "/livez"]
)
def test_every_answer_has_the_security_headers(api: Service, path: str) -> None:
    for answer in (api.get(path), api.page(path)):
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        if answer.headers["Content-Type"].startswith("text/html"):
            assert "<script" not in answer.text
            assert "style=" not in answer.text


def test_metrics_on_a_separate_address_count_by_route(api: Service) -> None:
    def counted(line: str) -> float:
        text = api.get("/metrics", address=api.metrics_address).text
        return sum(float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line))

    requests = 'orders_http_requests_total{method="GET",route="/orders/{order_uid}",status="404"}'
    seconds = 'orders_http_request_seconds_count{route="/orders/{order_uid}"}'
    before = counted(requests), counted(seconds)
    api.get("/orders/nobody-1")
    api.get("/orders/nobody-2")
    assert (counted(requests), counted(seconds)) == (before[0] + 2, before[1] + 2)
    assert api.get("/metrics").status == 404
    assert api.get(SAMPLE_PATH, address=api.metrics_address).status == 404


def test_the_log_has_no_personal_data(guarded: Service, store: orderlib.PostgresOrderRepository) -> None:
    private = attrs.evolve(SAMPLE.delivery, name="Ludmila Privat", email="l@privat.example")
    store.save(order("logged", delivery=private, customer_id="customer-of-log"))
    token = bearer("secret-1")
    guarded.get("/orders?customer_id=customer-of-log", token)
    guarded.get("/search?q=Ludmila%20Privat", token)
    guarded.page("/search?q=l@privat.example")
    guarded.get("/search?q=l@privat.example&limit=Ludmila", token)
    guarded.get("/orders?email=l@privat.example", token)
    guarded.get("/orders/Ludmila", token)
    answer = guarded.get("/orders/logged", token)
    assert "Ludmila" in answer.text
    line = guarded.line_of(answer)
    assert line.keys() >= {"route", "method", "status", "ms", "request_id", "token_name"}
    assert (line["route"], line["status"], line["order_uid"]) == ("/orders/{order_uid}", 200, "logged")
    log = json.dumps(guarded.events())
    assert "Ludmila" not in log
    assert "privat" not in log
    assert "customer-of-log" not in log
    assert "secret-1" not in log


def test_openapi_has_the_schema_of_the_contract(api: Service) -> None:
    document = api.get("/openapi.json").json
    assert document["openapi"].startswith("3.1")
    schema = {"$ref": "#/components/schemas/Order", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(api.get(SAMPLE_PATH).json)
    broken = {**api.get(SAMPLE_PATH).json, "sm_id": "99"}
    assert not jsonschema.Draft202012Validator(schema).is_valid(broken)


def test_every_field_of_an_order_is_on_its_page(api: Service, store: orderlib.PostgresOrderRepository) -> None:
    shown = order(
        "shown",
        track_number="TRACK-1",
        entry="ENTRY-1",
        locale="loc-1",
        internal_signature="SIGN-1",
        customer_id="CUST-1",
        delivery_service="CARRIER-1",
        shardkey="SHARD-1",
        sm_id=4711,
        oof_shard="OOF-1",
        payment=attrs.evolve(SAMPLE.payment, amount=123456, currency="EUR", transaction="TRANS-1", request_id="REQ-1"),
    )
    store.save(shown)
    page = api.page("/orders/shown").text
    texts = [
        *(value for value in attrs.astuple(shown.delivery) if value),
        *(value for value in attrs.astuple(shown, recurse=False) if isinstance(value, str)),
        *("TRANS-1", "REQ-1", "4711", "1,234.56", "EUR", "26 Nov 2021, 06:22:19 UTC", shown.payment.provider),
        *(shown.items[0].name, shown.items[0].brand, shown.items[0].rid, str(shown.items[0].nm_id), "30 %"),
    ]
    assert [text for text in texts if text not in page] == []


def test_an_order_is_escaped_on_every_page(api: Service, store: orderlib.PostgresOrderRepository) -> None:
    evil = '"><script>alert(1)</script>&amp;'
    store.save(
        order(
            "evil",
            customer_id=evil,
            track_number=evil,
            delivery=attrs.evolve(SAMPLE.delivery, name=evil, address=evil),
            payment=attrs.evolve(SAMPLE.payment, transaction=evil, provider=evil),
            items=[attrs.evolve(SAMPLE.items[0], name=evil, brand=evil, size="<b>", rid=evil)],
        )
    )
    quoted = "%22%3E%3Cscript%3Ealert(1)%3C/script%3E%26amp;"
    for path in (
        "/orders/evil",
        f"/orders?customer_id={quoted}",
        f"/orders?track_number={quoted}",
        f"/search?q={quoted}x",
    ):
        page = api.page(path).text
        assert "alert(1)" in page
        assert "<script" not in page
        assert '"><script' not in page


def test_a_search_answers_with_the_matches_and_their_reasons(
    api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save(order("look-up", customer_id="Look Ü", delivery=attrs.evolve(SAMPLE.delivery, phone="+1 (555) 0100")))
    store.save(order("look-up-2", track_number="15550100"))
    answer = api.get("/search?q=1-555-0100")
    assert answer.headers["Cache-Control"] == "no-store"
    [match] = answer.json["matches"]
    assert (match["order_uid"], match["fields"]) == ("look-up", ["phone"])
    assert [(m["order_uid"], m["fields"]) for m in api.get("/search?q=15550100").json["matches"]] == [
        ("look-up-2", ["track_number"]),
        ("look-up", ["phone"]),
    ]
    assert len(api.get("/search?q=LOOK&limit=1").json["matches"]) == 1
    assert api.get("/search?q=nobody%20at%20all").json == {"matches": []}
    for query in ("", "?q=", "?q=%20", "?q=a&limit=0", "?q=" + "a" * 601):
        assert api.get("/search" + query).status == 400


def test_every_text_that_is_allowed_fits_into_a_url(api: Service, store: orderlib.PostgresOrderRepository) -> None:
    store.save(order("emoji", customer_id=EMOJI * 255, track_number=EMOJI * 255))
    encoded = quote(EMOJI * 255)
    found = api.get(f"/orders?customer_id={encoded}&track_number={encoded}&limit=100&format=json&meta=1")
    assert [listed["order_uid"] for listed in found.json["orders"]] == ["emoji"]
    limit = api.get("/openapi.json").json["paths"]["/search"]["parameters"][0]["schema"]["maxLength"]
    longest = f"/search?limit=100&q={quote(EMOJI * limit)}"
    assert api.get(longest).json == {"matches": []}
    page = api.page(longest)
    assert page.status == 200
    assert f'maxlength="{limit}"' in page.text
    assert EMOJI * limit in page.text


def test_the_search_page_opens_a_single_match_and_shows_several(
    api: Service, store: orderlib.PostgresOrderRepository
) -> None:
    store.save(order("open-1:a", customer_id="Open Ü"))
    answer = api.page("/search?q=%20open%20%C3%9C")
    assert answer.status == 200
    answer = api.page("/search?q=Open%20%C3%9C%20")
    assert (answer.status, answer.headers["Location"]) == (303, "/orders/open-1:a")
    assert answer.headers["Cache-Control"] == "no-store"
    store.save(order("open-2", customer_id="Open Ü"))
    several = api.page("/search?q=Open%20%C3%9C")
    assert (several.status, several.headers["Cache-Control"]) == (200, "no-store")
    assert "open-1:a" in several.text
    assert "open-2" in several.text
    missing = api.page("/search?q=nobody%20at%20all")
    assert (missing.status, missing.headers["Cache-Control"]) == (200, "no-store")
    assert "nobody at all" in missing.text


def test_orders_are_listed_by_phone_and_email(api: Service, store: orderlib.PostgresOrderRepository) -> None:
    store.save(order("reach-1", delivery=attrs.evolve(SAMPLE.delivery, phone="+7 (999) 1", email="Reach@x.example")))
    for query in ("phone=79991", "phone=%2B7%20999-1", "email=reach@X.example", "phone=79991&email=REACH@x.example"):
        found = api.get(f"/orders?{query}").json["orders"]
        assert [order["order_uid"] for order in found] == ["reach-1"], query
        assert "reach-1" in api.page(f"/orders?{query}").text
    assert api.get("/orders?phone=none").json["detail"] == "phone: expected digits, found none."


def test_the_status_strip_counts_new_orders_and_rejects(api: Service) -> None:
    page = api.page("/").text
    assert "Newest order" in page
    assert " ago" in page
    assert "Rejects" in page
