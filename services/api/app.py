"""The application: resources, middleware and errors put together. Whoever makes it brings the reader."""

from __future__ import annotations

from collections.abc import Callable

import falcon.asgi
from falcon.asgi import Request, Response

from orderlib.config import ApiSettings
from orderlib.repository import AsyncOrderReader
from services.api.access import Access
from services.api.health import LiveResource, ReadyResource
from services.api.home import HomeResource
from services.api.observation import Metrics, Observation
from services.api.openapi import OpenApiResource
from services.api.orders import OrderResource, OrdersResource
from services.api.pages import Pages, StaticResource
from services.api.problems import Problems


def create_app(
    reader: AsyncOrderReader, settings: ApiSettings, metrics: Metrics, make_id: Callable[[], str]
) -> falcon.asgi.App[Request, Response]:
    """The API over a reader, as an ASGI application."""
    pages = Pages()
    app: falcon.asgi.App[Request, Response] = falcon.asgi.App(
        middleware=[Observation(metrics, make_id), Access(settings)]
    )
    Problems(pages).attach(app)
    app.add_route("/", HomeResource(reader, pages))
    app.add_route("/orders", OrdersResource(reader, pages))
    app.add_route("/orders/{order_uid}", OrderResource(reader, pages))
    app.add_route("/static/{name}", StaticResource(pages))
    app.add_route("/openapi.json", OpenApiResource())
    app.add_route("/livez", LiveResource())
    app.add_route("/readyz", ReadyResource(reader))
    return app
