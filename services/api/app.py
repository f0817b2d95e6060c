"""The application: resources, middleware and error handlers. The caller provides the repository."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Protocol
from urllib.parse import quote_from_bytes

import falcon.asgi
from falcon.asgi import Request, Response
from falcon.asgi_spec import AsgiEvent, AsgiSendMsg

from orderlib.repository import AsyncOrderRepository
from services.api.auth import AuthMiddleware
from services.api.error_handlers import add_error_handlers, log_failure
from services.api.health import LiveResource, ReadyResource
from services.api.home import HomeResource
from services.api.metrics import UNMATCHED, UNREADABLE
from services.api.openapi import OpenApiResource
from services.api.orders import OrderResource, OrdersResource
from services.api.pages import Pages, StaticResource
from services.api.parameters import ParametersMiddleware
from services.api.records import RecordResource
from services.api.rejects import AsyncRejectRepository, RejectsResource
from services.api.request_metrics import MetricsResource, RequestMetricsMiddleware
from services.api.search import SearchResource
from services.settings import ApiSettings

#: What an ASGI server calls an application with.
Scope = dict[str, Any]
Receive = Callable[[], Awaitable[AsgiEvent]]
Send = Callable[[AsgiSendMsg], Awaitable[None]]

#: The routes of the API, and what creates the resource of each.
_RESOURCES: dict[str, Callable[[ApiRepository, Pages], object]] = {
    "/": HomeResource,
    "/orders": OrdersResource,
    "/orders/{order_uid}": OrderResource,
    "/search": SearchResource,
    "/rejects": RejectsResource,
    "/records/{topic}/{partition}/{offset}": lambda repository, _pages: RecordResource(repository),
    "/static/{name}": lambda _repository, pages: StaticResource(pages),
    "/openapi.json": lambda _repository, _pages: OpenApiResource(),
}
#: Those that both addresses serve.
_HEALTH_RESOURCES: dict[str, Callable[[AsyncOrderRepository], object]] = {
    "/livez": lambda _repository: LiveResource(),
    "/readyz": ReadyResource,
}
ROUTES = (*_RESOURCES, *_HEALTH_RESOURCES)
METRICS_ROUTE = "/metrics"

_ASCII = bytes(range(128)).decode()


class Api(falcon.asgi.App[Request, Response]):
    """A Falcon application that answers every request with the promised headers, also those that Falcon fails on."""

    def __init__(self, request_metrics: RequestMetricsMiddleware, pages: Pages, *middleware: AuthMiddleware) -> None:
        super().__init__(middleware=[request_metrics, *middleware, ParametersMiddleware()])
        self._request_metrics = request_metrics
        add_error_handlers(self, pages)

    # The override is Falcon's: its ASGI application inherits from the WSGI one.
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # type: ignore[override]
        """Serve a request.

        Falcon raises for some query strings and methods before its error handlers apply: change these here.
        """
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        if not scope["query_string"].isascii():
            scope["query_string"] = quote_from_bytes(scope["query_string"], safe=_ASCII).encode()
        if scope["method"] == "WEBSOCKET":
            # Falcon uses this method for a websocket handshake and refuses it before any middleware runs.
            scope["method"] = "websocket"
        try:
            await super().__call__(scope, _no_body, send)
        except Exception as exc:  # noqa: BLE001 - an error handler failed, and the client still gets an answer
            log_failure(exc)
            headers, body = self._request_metrics.refuse(HTTPStatus.INTERNAL_SERVER_ERROR, UNMATCHED)
            encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": HTTPStatus.INTERNAL_SERVER_ERROR, "headers": encoded})
            await send({"type": "http.response.body", "body": body})

    def refuse(self, status: HTTPStatus) -> tuple[dict[str, str], bytes]:
        """Return the headers and body for a request that the server cannot parse."""
        return self._request_metrics.refuse(status, UNREADABLE)


async def _no_body() -> AsgiEvent:
    """Return an empty body at once: no resource reads the body of a request."""
    return {"type": "http.request", "body": b"", "more_body": False}


class ApiRepository(AsyncOrderRepository, AsyncRejectRepository, Protocol):
    """The orders and rejects that the API reads."""


def create_app(
    repository: ApiRepository,
    settings: ApiSettings,
    request_metrics: RequestMetricsMiddleware,
    health_repository: AsyncOrderRepository | None = None,
) -> Api:
    """Return the API over a repository. ``/readyz`` uses ``health_repository`` if it is given."""
    pages = Pages(settings.status_words)
    app = Api(request_metrics, pages, AuthMiddleware(settings))
    for route, create_resource in _RESOURCES.items():
        app.add_route(route, create_resource(repository, pages))
    _add_health(app, health_repository or repository)
    return app


def create_metrics_app(health_repository: AsyncOrderRepository, request_metrics: RequestMetricsMiddleware) -> Api:
    """Return the application for ``ORDERS_METRICS_BIND``: metrics, and health for when clients overload the API."""
    app = Api(request_metrics, Pages())
    app.add_route(METRICS_ROUTE, MetricsResource(request_metrics))
    _add_health(app, health_repository)
    return app


def _add_health(app: Api, repository: AsyncOrderRepository) -> None:
    for route, create_resource in _HEALTH_RESOURCES.items():
        app.add_route(route, create_resource(repository))
