"""One way of serving orders, for ``bench.api`` to measure: ``python -m bench.api_server APPLICATION SERVER PORT``.

Applications: ``ours`` is the API as it is, with a fixed body at ``/hello`` besides. ``four`` reads with four plain
SELECTs through psycopg and its pool, as the service that orderlib replaces did; ``four-ours`` sends the same four
through our own driver. ``wsgi`` is ``ours`` as a WSGI application.
"""

from __future__ import annotations

import argparse
import os
import uuid
from collections.abc import Callable, Coroutine
from typing import Any

import falcon
import falcon.asgi
import psycopg
from psycopg.abc import PQGen
from psycopg_pool import AsyncConnectionPool

from orderlib.codecs import encode_order
from orderlib.errors import OrderNotFound
from orderlib.postgres.async_repository import AsyncPostgresOrderReader
from orderlib.postgres.reads import ReadQueries
from orderlib.postgres.repository import PostgresOrderRepository
from orderlib.postgres.rows import DELIVERY_COLUMNS, ITEM_COLUMNS, ORDER_COLUMNS, PAYMENT_COLUMNS, Row, order_from_rows
from orderlib.repository import StoredOrder
from services.api.app import ROUTES, create_app
from services.api.auth import AuthMiddleware
from services.api.metrics import Metrics
from services.api.request_metrics import RequestMetricsMiddleware
from services.api.server import Server, listen
from services.program import set_up_logging
from services.settings import Address, ApiSettings

STORE_COLUMNS = ("first_stored_at", "stored_at", "content_sha256")
ORDERS = f"SELECT {', '.join(ORDER_COLUMNS + STORE_COLUMNS)} FROM orders WHERE order_uid = $1"
DELIVERY = f"SELECT {', '.join(DELIVERY_COLUMNS)} FROM delivery WHERE order_uid = $1"
PAYMENT = f"SELECT {', '.join(PAYMENT_COLUMNS)} FROM payment WHERE order_uid = $1"
ITEMS = f"SELECT order_uid, {', '.join(ITEM_COLUMNS)} FROM items WHERE order_uid = $1 ORDER BY line"
FOUR = (ORDERS, DELIVERY, PAYMENT, ITEMS)


def _stored_order(answers: list[list[Row]]) -> StoredOrder:
    [order], [delivery], [payment], items = answers
    width = len(ORDER_COLUMNS)
    store_values = dict(zip(STORE_COLUMNS, order[width:], strict=True))
    return StoredOrder(order=order_from_rows(order[:width] + delivery + payment, items), **store_values)


class FourQueries(AsyncPostgresOrderReader):
    """Four SELECTs, one after the other, in no common transaction: psycopg as its manual shows it."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._url = url
        self._driver_pool: AsyncConnectionPool[psycopg.AsyncConnection[Row]] | None = None

    async def get_stored(self, order_uid: str) -> StoredOrder:  # noqa: D102 - see the class
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
            answers = []
            for statement in FOUR:
                cursor = psycopg.AsyncRawCursor(connection)
                await cursor.execute(statement, [order_uid], binary=True)
                answers.append(await cursor.fetchall())
        return _stored_order(answers)


class FourQueriesOverOurs(AsyncPostgresOrderReader):
    """The same four, over the driver that ours uses."""

    async def get_stored(self, order_uid: str) -> StoredOrder:  # noqa: D102 - see the class
        def four(reading: ReadQueries) -> PQGen[StoredOrder]:
            answers = []
            for statement in FOUR:
                answers += yield from reading._pipeline((statement, [order_uid]))  # noqa: SLF001
            return _stored_order(answers)

        return await self._read(four)


BODY = b"x" * 1040


class Hello:
    """A fixed body of the sample's size."""

    async def on_get(self, _req: Any, resp: Any) -> None:  # noqa: D102
        resp.data, resp.content_type = BODY, falcon.MEDIA_JSON


def _now(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run to its end a coroutine that waits for nothing, as those of our middleware do."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits")


class _SyncMiddleware:
    """Our middleware for WSGI."""

    def __init__(self, observation: Any, access: Any) -> None:
        self._observation = observation
        self._access = access

    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        _now(self._observation.process_request(req, resp))
        _now(self._access.process_request(req, resp))

    def process_response(
        self, req: falcon.Request, resp: falcon.Response, resource: object, req_succeeded: bool
    ) -> None:
        _now(self._observation.process_response(req, resp, resource, req_succeeded))


class _SyncOrder:
    def __init__(self, url: str) -> None:
        self._url = url
        self._repository: PostgresOrderRepository | None = None

    def on_get(self, _req: falcon.Request, resp: falcon.Response, order_uid: str) -> None:
        if self._repository is None:
            self._repository = PostgresOrderRepository.connect(self._url, max_connections=16)
        try:
            resp.data = encode_order(self._repository.get(order_uid))
        except OrderNotFound as exc:
            raise falcon.HTTPNotFound from exc
        resp.content_type = falcon.MEDIA_JSON


class _SyncHello:
    def on_get(self, _req: falcon.Request, resp: falcon.Response) -> None:
        resp.data, resp.content_type = BODY, falcon.MEDIA_JSON


def build(application: str) -> Any:
    """One of the applications, from the settings in the environment."""
    set_up_logging(open(os.devnull, "w"))  # noqa: PTH123, SIM115 - for as long as the process lives
    settings = ApiSettings.from_mapping({**os.environ, "ORDERS_API_AUTH": "off"})
    metrics = Metrics(ROUTES)
    make_id: Callable[[], str] = lambda: uuid.uuid4().hex  # noqa: E731
    url = settings.reader_url
    if application.startswith("wsgi"):
        wsgi = falcon.App(
            middleware=_SyncMiddleware(RequestMetricsMiddleware(metrics, make_id), AuthMiddleware(settings))
        )
        wsgi.add_route("/orders/{order_uid}", _SyncOrder(url))
        wsgi.add_route("/hello", _SyncHello())
        return wsgi
    reader = {"four": FourQueries, "four-ours": FourQueriesOverOurs}.get(application, AsyncPostgresOrderReader)(url)
    app = create_app(reader, settings, metrics, make_id)
    app.add_route("/hello", Hello())
    return app


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m bench.api_server", description=__doc__)
    parser.add_argument("application", choices=["ours", "four", "four-ours", "wsgi"])
    parser.add_argument("server", choices=["asgi", "uvloop", "sync", "gthread", "granian"])
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    application, server, port = options.application, options.server, options.port
    if server == "granian":
        from granian import Granian  # noqa: PLC0415
        from granian.constants import Interfaces  # noqa: PLC0415

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
    beside = listen("PORT", Address(host="127.0.0.1", port=0))
    made = Server(listener, beside, load=lambda: build(application), metrics=Metrics(ROUTES), keepalive_s=75)
    if server in ("sync", "gthread"):
        made.cfg.set("worker_class", server)
        made.cfg.set("threads", 8 if server == "gthread" else 1)
    if server == "uvloop":
        made.cfg.set("asgi_loop", "uvloop")
    made.run()


def granian_application() -> Any:
    """What granian loads."""
    return build(os.environ["BENCH_APPLICATION"])


if __name__ == "__main__":
    main()
