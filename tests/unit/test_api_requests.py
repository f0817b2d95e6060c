"""For any request, the application answers without a server error and with the promised headers."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator
from http import HTTPMethod
from typing import Any, cast

import attrs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from structlog.testing import capture_logs
from structlog.typing import EventDict

import orderlib
from orderlib.postgres.reject_list import RejectPage, RejectQuery
from orderlib.repository import AsyncOrderRepository, StoredOrder
from orderlib.testing import SAMPLE, MemoryOrderRepository
from services.api import deadline, orders
from services.api.app import METRICS_ROUTE, ROUTES, Api, ApiRepository, create_app, create_metrics_app
from services.api.event_loop import EventLoop
from services.api.metrics import ApiMetrics
from services.api.pages import Pages
from services.api.request_metrics import MAX_ANSWERED, RequestMetricsMiddleware
from services.settings import Address, ApiSettings

ORDER = orderlib.decode_order(SAMPLE)
ETAG = f'"{orderlib.content_sha256(ORDER).hex()}"'
TOKEN = "t0ken"
OPEN = {"/livez", "/readyz", "/openapi.json"}

Headers = list[tuple[bytes, bytes]]


@attrs.frozen
class RepositoryWithoutRejects:
    """The in-memory repository for asyncio, without rejects."""

    repository: MemoryOrderRepository

    async def list_rejects(self, query: RejectQuery) -> RejectPage:
        del query
        return RejectPage(rejects=(), next_cursor=None)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def read(*args: Any, **kwargs: Any) -> Any:
            if name == "check":
                return self.repository.stats().replication_delay_s
            return getattr(self.repository, name)(*args, **kwargs)

        return read


@attrs.frozen
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


@attrs.define
class Application:
    """The API in this process, with its log records."""

    app: Api
    metrics: ApiMetrics
    logged: list[EventDict]

    def send(self, path: str = "/", query: bytes = b"", headers: Headers | None = None, method: str = "GET") -> Answer:
        return asyncio.run(asyncio.wait_for(self.answer(path, query, headers, method), 5))

    async def answer(
        self, path: str, query: bytes = b"", headers: Headers | None = None, method: str = "GET"
    ) -> Answer:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": b"",
            "query_string": query,
            "root_path": "",
            "headers": [(b"host", b"localhost"), *(headers or [])],
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            await asyncio.Event().wait()  # the body never arrives
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        start, *bodies = sent
        given = {name.decode(): value.decode() for name, value in start["headers"]}
        return Answer(start["status"], given, b"".join(body.get("body", b"") for body in bodies))

    def counted(self) -> float:
        lines = generate_latest(self.metrics.registry).decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("orders_http_requests_total{"))


def application_over(
    repository: MemoryOrderRepository, metrics: ApiMetrics | None = None, reads: RepositoryWithoutRejects | None = None
) -> Api:
    address = Address(host="127.0.0.1", port=0)
    settings = ApiSettings(reader_url="", bind=address, metrics_bind=address, tokens={"test": TOKEN})
    api_repository = cast("ApiRepository", reads or RepositoryWithoutRejects(repository))
    request_metrics = RequestMetricsMiddleware(metrics or ApiMetrics([*ROUTES, METRICS_ROUTE]), make_id=lambda: "made")
    return create_app(api_repository, settings, request_metrics)


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    repository = MemoryOrderRepository()
    repository.save_many([ORDER, attrs.evolve(ORDER, order_uid="other")])
    metrics = ApiMetrics([*ROUTES, METRICS_ROUTE])
    app = application_over(repository, metrics)
    with capture_logs() as logged:
        yield Application(app, metrics, logged)


def request_and_check(application: Application, **request: Any) -> Answer:
    """Send a request, and check what holds for every answer."""
    application.logged.clear()
    before = application.counted()
    answer = application.send(**request)
    assert answer.status < 500, answer
    assert answer.headers["x-request-id"]
    [line] = application.logged
    assert (line["event"], line["status"]) == ("request", answer.status)
    assert line["request_id"] == answer.headers["x-request-id"]
    assert application.counted() == before + 1
    if answer.status >= 400 and request.get("method") != "HEAD":
        assert answer.headers["cache-control"] == "no-store"
        kind = answer.headers["content-type"]
        assert kind.startswith(("application/problem+json", "text/html"))
        if not kind.startswith("text/html"):
            assert (
                json.loads(answer.body).items() >= {"status": answer.status, "request_id": line["request_id"]}.items()
            )
    return answer


PATHS = st.sampled_from(
    [
        "/",
        "/orders",
        f"/orders/{ORDER.order_uid}",
        "/orders/missing",
        "/records/orders/0/0",
        "/static/style.css",
        "/nowhere",
        *sorted(OPEN),
    ]
)
METHODS = st.sampled_from([*map(str, HTTPMethod), "BREW", "WEBSOCKET", "websocket", "get"])
NAMES = st.sampled_from(
    [
        *(b"accept", b"authorization", b"if-none-match", b"if-match", b"x-request-id", b"cookie", b"range", b"host"),
        *(b"if-modified-since", b"content-length", b"content-type", b"transfer-encoding", b"expect", b"forwarded"),
        *(b"x-forwarded-for", b"x-forwarded-host", b"connection", b"upgrade", b"origin", b"te", b"accept-charset"),
    ]
)
BYTES = st.binary(max_size=60).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b"").replace(b"\0", b""))
PIECES = st.sampled_from(
    [
        *(b"text/html", b"application/json", b"*/*", b"*", b"/", b"text/", b"foo", b"image/png", b"q", b"q=", b"q=1"),
        *(b"q=nan", b"q=-1", b"q=1e9", b"q=\xb2", b"0.5", b";", b",", b"=", b'"', b"\\", b" ", b"\t", b"W/", b"W"),
        *(ETAG.encode(), b'"a,b"', b"Bearer", b"Basic", TOKEN.encode(), base64.b64encode(b":" + TOKEN.encode())),
        *(b"\xe9", b"\xff", b"bytes=0-", b"bytes=-1,x", b"localhost", b":", b"[", b"]", b"-1", b"1_0", b"a" * 3000),
    ]
)
VALUES = BYTES | st.lists(PIECES, max_size=8).map(b"".join)
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=4)
QUERIES = BYTES | st.lists(
    st.sampled_from(
        [
            *(
                b"limit=",
                b"cursor=",
                b"~",
                b"customer_id=",
                b"track_number=",
                b"since=",
                b"until=2026-01-31T12:00:00Z",
                b"format=",
                b"q=",
                b"v=",
                b"x",
            ),
            *(b"1", b"json", b"&", b"=", b"%", b"%00", b"%ff", b"%C3%A9", b"\xe9", b"+", b"a", b";", b"%25"),
        ]
    ),
    max_size=7,
).map(b"".join)


@given(path=PATHS, query=QUERIES, headers=HEADERS, method=METHODS)
@example(path="/orders", query=b"", headers=[(b"accept", b"foo")], method="GET")
@example(path="/orders", query=b"", headers=[(b"accept", b",")], method="GET")
@example(path="/orders", query=b"customer_id=\xff", headers=[], method="GET")
@example(path="/orders", query=b"", headers=[], method="WEBSOCKET")
@example(path="/orders", query=b"", headers=[(b"authorization", b"Basic \xe9")], method="GET")
def test_without_a_token_every_request_is_answered_with_401(
    application: Application, path: str, query: bytes, headers: Headers, method: str
) -> None:
    if any(TOKEN.encode() in value or base64.b64encode(b":" + TOKEN.encode()) in value for _, value in headers):
        headers = []
    answer = request_and_check(application, path=path, query=query, headers=headers, method=method)
    if path not in OPEN:
        assert answer.status == 401


@given(path=PATHS, query=QUERIES, headers=HEADERS, method=METHODS)
@example(path="/orders", query=b"", headers=[(b"accept", b"foo")], method="GET")
@example(path="/", query=b"q=%00", headers=[(b"accept", b"text/html")], method="GET")
@example(path="/orders", query=b"", headers=[(b"content-length", b"x")], method="POST")
def test_with_a_token_no_request_causes_a_server_error(
    application: Application, path: str, query: bytes, headers: Headers, method: str
) -> None:
    known = (b"authorization", b"Bearer " + TOKEN.encode())
    others = [(name, value) for name, value in headers if name != b"authorization"]
    request_and_check(application, path=path, query=query, headers=[known, *others], method=method)


def with_token(*headers: tuple[bytes, bytes]) -> Headers:
    return [(b"authorization", b"Bearer " + TOKEN.encode()), *headers]


@pytest.mark.parametrize(
    ("accept", "status", "kind"),
    [
        (b"foo", 406, "application/problem+json"),
        (b",", 406, "application/problem+json"),
        (b"text/html;q=much", 406, "application/problem+json"),
        (b"foo, text/html", 200, "text/html; charset=utf-8"),
        (b",application/json,", 200, "application/json"),
        (b"", 200, "application/json"),
        (b"a/b," * 100_000, 406, "application/problem+json"),
    ],
)
def test_invalid_media_ranges_are_ignored(application: Application, accept: bytes, status: int, kind: str) -> None:
    answer = request_and_check(application, path="/orders", headers=with_token((b"accept", accept)))
    assert (answer.status, answer.headers["content-type"]) == (status, kind)


@pytest.mark.parametrize(
    ("path", "query", "named"),
    [
        ("/", "custmer=a", "custmer"),
        ("/", "q=a&q=b", "q"),
        ("/", "limit=1", "limit"),
        (f"/orders/{ORDER.order_uid}", "limit=1", "limit"),
        (f"/orders/{ORDER.order_uid}", "format=xml", "format"),
        (f"/orders/{ORDER.order_uid}", "format=json&format=json", "format"),
        ("/orders", "format=", "format"),
        ("/orders", "cursor=nonsense", "cursor"),
        ("/orders", "cursor=~", "cursor"),
        ("/orders", "cursor=~~", "cursor"),
        ("/orders", "customer_id=%ff", "query"),
        ("/orders", "since=2026-01-31", "since"),
        ("/orders", "until=2026-01-31T12:00:00", "until"),
        ("/orders", "customer_id=a&x", "x"),
        ("/rejects", "code=other", "code"),
        ("/rejects", "cursor=x", "cursor"),
        ("/rejects", "limit=0", "limit"),
        ("/rejects", "since=2026-01-01", "since"),
        ("/rejects", "key=x", "key"),
        ("/search", "q=x&limit=101", "limit"),
        ("/records/orders/0/0", "wait=-1", "wait"),
        ("/records/orders/0/0", "wait=5.001", "wait"),
        *(
            ("/records/orders/0/0", f"wait={wait}", "wait")
            for wait in ("nan", "inf", "1e1", "1e999", ".", "e1", "1e", "1_0", "0x1", "%D9%A1", "9" * 5_000, "1%20")
        ),
        ("/records/orders/0/0", "wait=", "wait"),
        ("/records/orders/0/0", "wait=1&wait=1", "wait"),
        ("/records/orders/0/0", "timeout=1", "timeout"),
        ("/records/or%20ders/0/0", "", "topic"),
        ("/records/orders/-1/0", "", "partition"),
        ("/records/orders/2147483648/0", "", "partition"),
        ("/records/orders/0/x", "", "offset"),
        ("/records/orders/0/9223372036854775808", "", "offset"),
        ("/openapi.json", "x=1", "x"),
        ("/livez", "x=1", "x"),
        ("/readyz", "x=1", "x"),
        ("/static/style.css", "w=1", "w"),
    ],
)
def test_no_parameter_is_ignored(application: Application, path: str, query: str, named: str) -> None:
    for accept in (b"application/json", b"text/html"):
        headers = with_token((b"accept", accept))
        answer = request_and_check(application, path=path, query=query.encode(), headers=headers)
        assert answer.status == 400
        assert f"{named}: expected" in answer.body.decode()


def test_a_file_is_cached_only_under_its_own_version(application: Application) -> None:
    """During a roll-out, a page of one release may request the file of another one."""
    page = application.send("/", headers=with_token((b"accept", b"text/html"))).body.decode()
    [version] = re.findall(r"/static/style\.css\?v=(\w+)", page)
    for query, cached in [
        (f"v={version}", "private, max-age=31536000, immutable"),
        ("v=0", "no-cache"),
        ("", "no-cache"),
    ]:
        answer = application.send("/static/style.css", query.encode(), with_token())
        assert (answer.status, answer.headers["cache-control"]) == (200, cached)


@pytest.mark.parametrize(
    "wait", ["0", "1e-05", "1E-5", ".001", "0.", "0.0", "00", "1e%2B0", "5e-400", "0." + "0" * 99 + "1"]
)
def test_a_wait_is_any_number_from_0_to_5(application: Application, wait: str) -> None:
    answer = request_and_check(
        application, path="/records/orders/0/0", query=f"wait={wait}".encode(), headers=with_token()
    )
    assert (answer.status, json.loads(answer.body)["state"]) == (200, "unknown")


def test_a_cursor_carries_its_direction(application: Application) -> None:
    """The link to newer orders leads back to the page before."""
    first = json.loads(application.send("/orders", b"limit=1", with_token()).body)
    second = json.loads(
        application.send("/orders", f"limit=1&cursor={first['next_cursor']}".encode(), with_token()).body
    )
    page = application.send(
        "/orders", f"limit=1&cursor={first['next_cursor']}".encode(), with_token((b"accept", b"text/html"))
    )
    [newer] = re.findall(r'rel="prev" href="/orders\?cursor=(~[\w-]+)&', page.body.decode())
    assert first["orders"] != second["orders"]
    assert json.loads(application.send("/orders", f"cursor={newer}&limit=1".encode(), with_token()).body) == {
        "orders": first["orders"],
        "next_cursor": None,
    }


def test_every_list_leads_back_to_its_first_page(application: Application) -> None:
    as_page = with_token((b"accept", b"text/html"))
    after_the_last = orderlib.Cursor(first_stored_at=dt.datetime(1, 1, 1, tzinfo=dt.UTC), order_uid="")
    second = json.loads(application.send("/orders", b"limit=1", with_token()).body)["next_cursor"]
    for filters in ("", f"customer_id={ORDER.customer_id}"):
        first = application.send("/orders", f"limit=100&{filters}".encode(), as_page).body.decode()
        assert "<nav" not in first
        for cursor, has_orders in [(second, True), (after_the_last, False)]:
            page = application.send("/orders", f"{filters}&cursor={cursor}".encode(), as_page).body.decode()
            assert ("<table" in page) == has_orders
            assert re.findall(r'<a href="([^"]+)">Newest</a>', page) == [f"/orders?{filters}".rstrip("?")]


@pytest.mark.parametrize("path", ["/search", "/nowhere"])
def test_an_error_page_keeps_the_text_of_a_search(application: Application, path: str) -> None:
    as_page = with_token((b"accept", b"text/html"))
    for query, text in [(b"q=a%22b&x=1", "a&#34;b"), (b"q=a&q=b", ""), (b"x=1", "")]:
        page = application.send(path, query, as_page)
        assert page.status in {400, 404}
        assert f'type="search" value="{text}"' in page.body.decode()


def test_the_links_of_a_page_keep_the_period(application: Application) -> None:
    query = b"limit=1&since=0001-01-01T03:00:00%2B14:00&until=9999-12-31T23:59:59-14:00"
    page = application.send("/orders", query, with_token((b"accept", b"text/html")))
    [older] = re.findall(r'rel="next" href="/orders\?([^"]+)"', page.body.decode())
    assert (
        "&amp;limit=1&amp;since=0001-01-01T00%3A00%3A00%2B00%3A00"
        "&amp;until=9999-12-31T23%3A59%3A59.999999%2B00%3A00" in older
    )
    assert application.send("/orders", html.unescape(older).encode(), with_token()).status == 200


def test_the_etag_of_an_order_is_the_stored_digest_for_200_and_304(application: Application) -> None:
    """Also where the stored digest differs from the content, as after a change by hand."""
    repository = MemoryOrderRepository()
    repository.save(ORDER)
    stale = attrs.evolve(repository.get_stored(ORDER.order_uid), content_sha256=bytes(32))
    repository._store._stored[ORDER.order_uid] = stale
    app = application_over(repository)
    path, etag = f"/orders/{ORDER.order_uid}", f'"{bytes(32).hex()}"'
    for headers, status in [([], 200), ([(b"if-none-match", b"*")], 304), ([(b"if-none-match", etag.encode())], 304)]:
        answer = attrs.evolve(application, app=app).send(path, headers=with_token(*headers))
        assert (answer.status, answer.headers["etag"]) == (status, etag)


def test_an_order_with_unknown_fields_is_returned_as_it_was_sent(application: Application) -> None:
    repository = MemoryOrderRepository()
    text = orderlib.encode_order(ORDER)[:-1] + b' , "later": 1e400}'
    repository.save(ORDER, original=text)
    served, path = attrs.evolve(application, app=application_over(repository)), f"/orders/{ORDER.order_uid}"
    answer = served.send(path, b"format=original", with_token((b"accept", b"text/html")))
    etag = f'"{hashlib.sha256(text).hexdigest()}"'
    assert (answer.status, answer.body, answer.headers["etag"]) == (200, text, etag)
    assert answer.headers["content-type"] == "application/json"
    known = with_token((b"if-none-match", etag.encode()))
    assert served.send(path, b"format=original", known).status == 304
    assert b"format=original" in served.send(path, b"", with_token((b"accept", b"text/html"))).body
    repository.save(attrs.evolve(ORDER, entry="other"))
    assert served.send(path, b"format=original&view=page", known).status == 400
    missing = served.send(path, b"format=original", known)
    assert (missing.status, b"no unknown fields" in missing.body) == (404, True)
    assert b"format=original" not in served.send(path, b"", with_token((b"accept", b"text/html"))).body


@pytest.mark.parametrize(
    ("delay_s", "more", "shown"),
    [
        (None, {}, None),
        (0.0, {"replication_delay_s": 0.0}, None),
        (4.98765, {"replication_delay_s": 4.988}, None),
        (61.0, {"replication_delay_s": 61.0}, "data is up to 61 s behind the primary"),
        (7200.0, {"replication_delay_s": 7200.0}, "data is up to 2 h behind the primary"),
    ],
)
def test_the_replication_delay_of_a_standby_is_shown(
    application: Application,
    monkeypatch: pytest.MonkeyPatch,
    delay_s: float | None,
    more: dict[str, float],
    shown: str | None,
) -> None:
    stats = MemoryOrderRepository().stats()
    assert stats.replication_delay_s is None
    monkeypatch.setattr(MemoryOrderRepository, "stats", lambda _: attrs.evolve(stats, replication_delay_s=delay_s))
    answer = request_and_check(application, path="/readyz")
    assert (answer.status, json.loads(answer.body)) == (200, {"status": "ready", **more})
    page = request_and_check(application, headers=with_token((b"accept", b"text/html"))).body.decode()
    assert (shown is None) == ("behind the primary" not in page)
    assert shown is None or shown in page


def test_openapi_names_the_headers_of_each_response(application: Application) -> None:
    document = json.loads(application.send("/openapi.json").body)

    def documented(path: str, status: int, method: str = "get") -> set[str]:
        response = document["paths"][path][method]["responses"][str(status)]
        if "$ref" in response:
            response = document["components"]["responses"][response["$ref"].rpartition("/")[2]]
        return {name.lower() for name in response["headers"]}

    page, known = (b"accept", b"text/html"), (b"if-none-match", ETAG.encode())
    order, record = "/orders/{order_uid}", "/records/{topic}/{partition}/{offset}"
    requests: list[tuple[str, str, dict[str, Any], int]] = [
        *((path, path, {}, 200) for path in ("/orders", "/rejects", "/livez", "/readyz")),
        *((path, path, {"method": "PUT"}, 405) for path in ("/orders", "/rejects", "/search", "/livez", "/readyz")),
        *((path, path, {"query": b"x"}, 400) for path in ("/orders", "/rejects", "/search", "/livez", "/readyz")),
        *((path, path, {"headers": []}, 401) for path in ("/orders", "/rejects", "/search")),
        ("/orders", "/orders", {"headers": with_token((b"accept", b"image/png"))}, 406),
        (order, f"/orders/{ORDER.order_uid}", {}, 200),
        (order, f"/orders/{ORDER.order_uid}", {"headers": with_token(known)}, 304),
        (order, f"/orders/{ORDER.order_uid}", {"method": "PUT"}, 405),
        (order, "/orders/missing", {}, 404),
        ("/search", "/search", {"query": f"q={ORDER.order_uid}".encode()}, 200),
        ("/search", "/search", {"query": f"q={ORDER.order_uid}".encode(), "headers": with_token(page)}, 303),
        (record, "/records/orders/0/0", {}, 200),
        (record, "/records/orders/0/0", {"method": "PUT"}, 405),
    ]
    for path, sent, request, status in requests:
        answer = application.send(sent, **{"headers": with_token(), **request})
        assert answer.status == status, path
        # The content has a part of its own in the document, and the server adds Vary to each response.
        named = answer.headers.keys() - {"content-type", "content-length"}
        assert named == documented(path, status) - {"vary"}, (path, status)
    for path, methods in document["paths"].items():
        assert {"$ref": "#/components/parameters/X-Request-Id"} in methods["parameters"]
        assert documented(path, 414) == {"x-request-id", "cache-control"}


def test_a_failing_error_handler_is_answered_with_a_problem_document(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falcon does not handle an exception of an error handler."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError(ORDER.delivery.name)

    monkeypatch.setattr(Pages, "show", fail)
    application.logged.clear()
    before = application.counted()
    answer = application.send("/orders/missing", headers=with_token((b"accept", b"text/html")))
    assert (answer.status, answer.headers["content-type"]) == (500, "application/problem+json")
    assert json.loads(answer.body)["request_id"] == answer.headers["x-request-id"] == "made"
    assert [line["event"] for line in application.logged][-2:] == ["request_failed", "request"]
    assert ORDER.delivery.name not in str(application.logged)
    assert application.counted() == before + 1


def test_every_route_has_its_own_counts(application: Application) -> None:
    for route in ROUTES:
        application.send(
            route.format(order_uid="missing", name="style.css", topic="orders", partition=0, offset=0),
            headers=with_token(),
        )
    text = generate_latest(application.metrics.registry).decode()
    assert [route for route in ROUTES if f'route="{route}"' not in text] == []


def test_both_reads_of_a_changed_order_have_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class SecondReadHangs(RepositoryWithoutRejects):
        async def get_stored(self, order_uid: str) -> StoredOrder:
            await asyncio.sleep(1)
            return self.repository.get_stored(order_uid)

    monkeypatch.setattr(orders, "ANSWER_TIMEOUT_S", 0.1)
    repository = MemoryOrderRepository()
    repository.save(ORDER)
    application = Application(application_over(repository, reads=SecondReadHangs(repository)), ApiMetrics(ROUTES), [])
    older = with_token((b"if-none-match", b'"an older version"'))
    assert application.send(f"/orders/{ORDER.order_uid}", headers=older).status == 503


def test_the_reads_of_a_check_have_one_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    class CheckHangs(RepositoryWithoutRejects):
        async def check(self) -> float | None:
            await asyncio.sleep(1)
            return None

    monkeypatch.setattr(deadline, "ANSWER_TIMEOUT_S", 0.1)
    repository = MemoryOrderRepository()
    application = Application(application_over(repository, reads=CheckHangs(repository)), ApiMetrics(ROUTES), [])
    assert application.send("/readyz").status == 503


def test_a_worker_that_is_never_idle_logs_and_counts_many_requests_at_a_time(application: Application) -> None:
    async def send_without_a_pause() -> None:
        before, logged = application.counted(), len(application.logged)
        for _ in range(MAX_ANSWERED - 1):
            await application.answer("/livez")
        assert (application.counted(), len(application.logged)) == (before, logged)
        await application.answer("/livez")
        assert (application.counted(), len(application.logged)) == (before + MAX_ANSWERED, logged + MAX_ANSWERED)
        await application.answer("/livez")
        while application.counted() < before + MAX_ANSWERED + 1:
            await asyncio.sleep(0.001)

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(asyncio.wait_for(send_without_a_pause(), 10))


def test_the_metrics_include_every_request_that_the_worker_has_answered() -> None:
    metrics = ApiMetrics([*ROUTES, METRICS_ROUTE])
    app = create_metrics_app(cast("AsyncOrderRepository", None), RequestMetricsMiddleware(metrics, make_id=str))
    application = Application(app, metrics, [])

    async def send_without_a_pause() -> None:
        await application.answer("/livez")
        assert b'route="/livez",status="200"} 1.0' in (await application.answer(METRICS_ROUTE)).body

    with asyncio.Runner(loop_factory=EventLoop) as runner:
        runner.run(send_without_a_pause())
