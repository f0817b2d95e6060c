"""Serve orders for ``bench.api``: ``python -m bench.api_server APPLICATION SERVER PORT``.

Each application also has a fixed body at ``/hello``. The applications:

* ``orderlib``: the API of ``services.api``
* ``four-queries``: reads with four SELECTs through psycopg and its pool, as the service that orderlib replaces
* ``four-queries-own-driver``: the same four SELECTs through orderlib's own connections
* ``bare``: only the fixed body, without the API's middleware
* ``wsgi``: the API as a WSGI application
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Coroutine
from typing import Any

import falcon
import falcon.asgi
import psycopg
from psycopg.abc import PQGen
from psycopg_pool import AsyncConnectionPool

from orderlib.codecs import encode_order
from orderlib.errors import OrderNotFound
from orderlib.postgres.async_repository import AsyncPostgresOrderRepository
from orderlib.postgres.connect import connect, connect_async
from orderlib.postgres.pool import Pool
from orderlib.postgres.reads import ReadQueries
from orderlib.postgres.repository import PostgresOrderRepository
from orderlib.postgres.rows import DELIVERY_COLUMNS, ITEM_COLUMNS, ORDER_COLUMNS, PAYMENT_COLUMNS, Row, order_from_rows
from orderlib.repository import StoredOrder
from services.api import server as api_server
from services.api.app import ROUTES, create_app
from services.api.asgi import API_CONNECTIONS
from services.api.auth import AuthMiddleware
from services.api.metrics import ApiMetrics
from services.api.request_metrics import RequestMetricsMiddleware, make_request_id
from services.api.server import Server, listen
from services.program import set_up_logging
from services.settings import Address, ApiSettings

STORE_COLUMNS = ("first_stored_at", "stored_at", "content_sha256", "version")
ORDERS = f"SELECT {', '.join(ORDER_COLUMNS + STORE_COLUMNS)} FROM orders WHERE order_uid = $1"
DELIVERY = f"SELECT {', '.join(DELIVERY_COLUMNS)} FROM delivery WHERE order_uid = $1"
PAYMENT = f"SELECT {', '.join(PAYMENT_COLUMNS)} FROM payment WHERE order_uid = $1"
ITEMS = f"SELECT order_uid, {', '.join(ITEM_COLUMNS)} FROM items WHERE order_uid = $1 ORDER BY line"
FOUR_QUERIES = (ORDERS, DELIVERY, PAYMENT, ITEMS)


def _stored_order(results: list[list[Row]]) -> StoredOrder:
    [order], [delivery], [payment], items = results
    width = len(ORDER_COLUMNS)
    store_values = dict(zip(STORE_COLUMNS, order[width:], strict=True))
    return StoredOrder(order=order_from_rows(order[:width] + delivery + payment, items), position=None, **store_values)


def _pool(url: str) -> Pool:
    """Return a pool with as many connections as that of the API."""
    return Pool(
        url, application_name="orderlib", max_connections=API_CONNECTIONS, timeout_s=5.0, connection_timeout_s=1.5
    )


class FourQueriesRepository(AsyncPostgresOrderRepository):
    """Read an order with four SELECTs, one after another and without a transaction around them."""

    def __init__(self, url: str) -> None:
        super().__init__(_pool(url))
        self._url = url
        self._driver_pool: AsyncConnectionPool[psycopg.AsyncConnection[Row]] | None = None

    async def get_stored(self, order_uid: str) -> StoredOrder:  # noqa: D102 - the class docstring describes it
        if self._driver_pool is None:
            self._driver_pool = AsyncConnectionPool(
                self._url,
                min_size=8,
                max_size=8,
                open=False,
                kwargs={"autocommit": True},
                connection_class=psycopg.AsyncConnection[Row],
            )
            await self._driver_pool.open(wait=True)
        async with self._driver_pool.connection() as connection:
            results = []
            for statement in FOUR_QUERIES:
                cursor = psycopg.AsyncRawCursor(connection)
                await cursor.execute(statement, [order_uid], binary=True)
                results.append(await cursor.fetchall())
        return _stored_order(results)


class FourQueriesOwnDriverRepository(AsyncPostgresOrderRepository):
    """Read an order with the same four SELECTs, through the connections of orderlib's own repository."""

    def __init__(self, url: str) -> None:
        super().__init__(_pool(url))

    async def get_stored(self, order_uid: str) -> StoredOrder:  # noqa: D102 - the class docstring describes it
        def run_queries(queries: ReadQueries) -> PQGen[StoredOrder]:
            results = []
            for statement in FOUR_QUERIES:
                results += yield from queries._pipeline((statement, [order_uid]))  # noqa: SLF001 - no public method runs another SELECT
            return _stored_order(results)

        return await self._read(run_queries)


#: As many bytes as the sample order.
BODY = b"x" * 1040


class Hello:
    """Answer with a fixed body."""

    async def on_get(self, _req: Any, resp: Any) -> None:  # noqa: D102 - the class docstring describes it
        resp.data, resp.content_type = BODY, falcon.MEDIA_JSON


def _run_without_waiting(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits, as the middleware's never do. Raise AssertionError if it waits."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("the coroutine waits")


class _SyncMiddleware:
    """The API's middleware for WSGI."""

    # Any: the two are annotated with the request and response of ASGI.
    def __init__(self, metrics: Any, auth: Any) -> None:
        self._metrics = metrics
        self._auth = auth

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        # Any: a request of WSGI has no scope.
        asgi_like: Any = req
        asgi_like.scope = {"headers": []}
        _run_without_waiting(self._metrics.process_request(asgi_like, resp))
        _run_without_waiting(self._auth.process_request(req, resp))

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, _resource: object, _req_succeeded: bool
    ) -> None:
        self._metrics.log_and_count([self._metrics.answered(req, resp.status_code)])


class _SyncOrder:
    def __init__(self, url: str) -> None:
        self._url = url
        self._repository: PostgresOrderRepository | None = None

    def on_get(self, _req: falcon.Request, resp: falcon.Response, order_uid: str) -> None:
        if self._repository is None:
            self._repository = connect(self._url, max_connections=16)
        try:
            resp.data = encode_order(self._repository.get(order_uid))
        except OrderNotFound as exc:
            raise falcon.HTTPNotFound from exc
        resp.content_type = falcon.MEDIA_JSON


class _SyncHello:
    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        resp.data, resp.content_type = BODY, falcon.MEDIA_JSON


def build(application: str) -> Any:
    """Create an application from the settings in the environment."""
    set_up_logging(open(os.devnull, "w"))  # noqa: PTH123, SIM115 - it stays open until the process ends
    if application == "bare":
        bare = falcon.asgi.App()
        bare.add_route("/hello", Hello())
        return bare
    settings = ApiSettings.from_mapping({**os.environ, "ORDERS_API_AUTH": "off"})
    metrics = ApiMetrics(ROUTES)
    url = settings.reader_url
    if application.startswith("wsgi"):
        wsgi = falcon.App(
            middleware=_SyncMiddleware(RequestMetricsMiddleware(metrics, make_request_id), AuthMiddleware(settings))
        )
        wsgi.add_route("/orders/{order_uid}", _SyncOrder(url))
        wsgi.add_route("/hello", _SyncHello())
        return wsgi
    # Any: the benchmark reads no rejects.
    repositories: dict[str, Any] = {
        "four-queries": FourQueriesRepository,
        "four-queries-own-driver": FourQueriesOwnDriverRepository,
    }
    repository = repositories.get(application, connect_async)(url)
    app = create_app(repository, settings, RequestMetricsMiddleware(metrics, make_request_id))
    app.add_route("/hello", Hello())
    return app


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m bench.api_server", description=__doc__)
    parser.add_argument("application", choices=["orderlib", "four-queries", "four-queries-own-driver", "bare", "wsgi"])
    parser.add_argument("server", choices=["asgi", "uvloop", "sync", "gthread", "granian"])
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    application, server, port = options.application, options.server, options.port
    if server == "granian":
        from granian import Granian  # noqa: PLC0415 - only this server needs it
        from granian.constants import Interfaces  # noqa: PLC0415 - only this server needs it

        interface = Interfaces.WSGI if application.startswith("wsgi") else Interfaces.ASGI
        os.environ["BENCH_APPLICATION"] = application
        Granian(
            "bench.api_server:granian_application",
            address="127.0.0.1",
            port=port,
            interface=interface,
            factory=True,
            log_enabled=False,
            blocking_threads=8 if interface is Interfaces.WSGI else None,
        ).serve()
        return
    listener = listen("PORT", Address(host="127.0.0.1", port=port))
    metrics_listener = listen("PORT", Address(host="127.0.0.1", port=0))
    gunicorn = Server(
        listener, metrics_listener, load=lambda: build(application), metrics=ApiMetrics(ROUTES), keepalive_s=75
    )
    if server in ("sync", "gthread"):
        gunicorn.cfg.set("worker_class", server)
        gunicorn.cfg.set("threads", 8 if server == "gthread" else 1)
    if server == "uvloop":
        # The API sets its own event loop, and so ignores gunicorn's setting.
        vars(api_server)["EventLoop"] = importlib.import_module("uvloop").Loop
    gunicorn.run()


def granian_application() -> Any:
    """Create the application that ``main`` chose; each granian worker calls this."""
    return build(os.environ["BENCH_APPLICATION"])


if __name__ == "__main__":
    main()
