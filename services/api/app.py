"""The application: resources, middleware and errors put together. Whoever makes it brings the reader."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote_from_bytes

import falcon.asgi
from falcon.asgi import Request, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from orderlib.repository import AsyncOrderReader
from services.api.auth import AuthMiddleware
from services.api.error_handlers import ErrorHandlers
from services.api.health import LiveResource, ReadyResource
from services.api.home import HomeResource
from services.api.metrics import UNMATCHED, UNREADABLE, Metrics
from services.api.openapi import OpenApiResource
from services.api.orders import OrderResource, OrdersResource
from services.api.pages import Pages, StaticResource
from services.api.parameters import ParametersMiddleware
from services.api.request_metrics import RequestMetricsMiddleware
from services.program import event
from services.settings import ApiSettings

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

#: The routes of the API.
ROUTES = ("/", "/orders", "/orders/{order_uid}", "/static/{name}", "/openapi.json", "/livez", "/readyz")
METRICS_ROUTE = "/metrics"

_ASCII = bytes(range(128)).decode()


class Api(falcon.asgi.App[Request, Response]):
    """A Falcon application that answers every request as the API promises, also where Falcon itself would not."""

    def __init__(self, observation: RequestMetricsMiddleware, pages: Pages, *middleware: AuthMiddleware) -> None:
        super().__init__(middleware=[observation, *middleware, ParametersMiddleware()])
        self._observation = observation
        ErrorHandlers(pages).attach(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        """Serve a request. Falcon raises outside its error handlers for what is changed here and for its own faults."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        if not scope["query_string"].isascii():
            scope["query_string"] = quote_from_bytes(scope["query_string"], safe=_ASCII).encode()
        if scope["method"] == "WEBSOCKET":
            # Falcon's own name for a handshake, refused before any middleware sees it.
            scope["method"] = "websocket"
        try:
            await super().__call__(scope, _no_body, send)
        except Exception as error:  # noqa: BLE001 - the last resort
            event(
                "request_failed",
                logging.ERROR,
                error=type(error).__name__,
                traceback="".join(traceback.format_tb(error.__traceback__)),
            )
            headers, body = self._observation.refuse(HTTPStatus.INTERNAL_SERVER_ERROR, UNMATCHED)
            encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": HTTPStatus.INTERNAL_SERVER_ERROR, "headers": encoded})
            await send({"type": "http.response.body", "body": body})

    def refuse(self, status: HTTPStatus) -> tuple[dict[str, str], bytes]:
        """See ``RequestMetricsMiddleware.refuse``: the headers and body for a request that the server cannot parse."""
        return self._observation.refuse(status, UNREADABLE)


async def _no_body() -> dict[str, Any]:
    """Nothing that we serve reads a body, so none is waited for."""
    return {"type": "http.request", "body": b"", "more_body": False}


class MetricsResource:
    """``/metrics``, on an address of its own."""

    def __init__(self, metrics: Metrics) -> None:
        self._registry = metrics.registry

    async def on_get(self, _req: Request, resp: Response) -> None:
        """Everything counted, in Prometheus' text format."""
        resp.content_type = CONTENT_TYPE_LATEST
        resp.data = generate_latest(self._registry)


def create_app(
    reader: AsyncOrderReader,
    settings: ApiSettings,
    metrics: Metrics,
    make_id: Callable[[], str],
    health_reader: AsyncOrderReader | None = None,
) -> Api:
    """The API over a reader, as an ASGI application; ``/readyz`` asks ``health_reader``, if there is one."""
    pages = Pages()
    app = Api(RequestMetricsMiddleware(metrics, make_id), pages, AuthMiddleware(settings))
    resources = (
        HomeResource(reader, pages),
        OrdersResource(reader, pages),
        OrderResource(reader, pages),
        StaticResource(pages),
        OpenApiResource(),
        LiveResource(),
        ReadyResource(health_reader or reader),
    )
    for route, resource in zip(ROUTES, resources, strict=True):
        app.add_route(route, resource)
    return app


def create_metrics_app(health_reader: AsyncOrderReader, metrics: Metrics, make_id: Callable[[], str]) -> Api:
    """What is served on ``ORDERS_METRICS_BIND``: metrics, and health once more, where clients cannot fill it up."""
    app = Api(RequestMetricsMiddleware(metrics, make_id), Pages())
    app.add_route(METRICS_ROUTE, MetricsResource(metrics))
    app.add_route("/livez", LiveResource())
    app.add_route("/readyz", ReadyResource(health_reader))
    return app
