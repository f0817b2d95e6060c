"""The ASGI application that each worker process runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orderlib.postgres.async_repository import AsyncPostgresOrderRepository
from orderlib.postgres.pool import Pool
from orderlib.postgres.rejects import AsyncPostgresOrderAndRejectRepository
from services.api.app import Api, Receive, Scope, Send, create_app, create_metrics_app
from services.api.metrics import ApiMetrics
from services.api.request_metrics import RequestMetricsMiddleware, make_request_id
from services.settings import ApiSettings

APPLICATION_NAME = "orderlib-api"
#: Connections of each worker to PostgreSQL.
API_CONNECTIONS = 8
#: Those that serve health only.
HEALTH_CONNECTIONS = 2
#: Time limits of a read, and of its wait for a connection. ``ANSWER_TIMEOUT_S`` limits several reads together.
READ_TIMEOUT_S = 4.0
CONNECTION_TIMEOUT_S = 1.5


class AddressRouter:
    """Pass each request to the API or to the metrics, by the address that it came to."""

    def __init__(self, api: Api, metrics: Api, metrics_port: int) -> None:
        self._api = api
        self._metrics = metrics
        self._metrics_port = metrics_port
        self.refuse = api.refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        is_for_metrics = scope["type"] == "http" and scope["server"][1] == self._metrics_port
        await (self._metrics if is_for_metrics else self._api)(scope, receive, send)


class _CloseRepositories:
    """Middleware that closes the repositories when the worker stops."""

    def __init__(self, *repositories: AsyncPostgresOrderRepository) -> None:
        self._repositories = repositories

    async def process_shutdown(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:  # noqa: ARG002 - the parameters that Falcon passes
        """Close the connections to PostgreSQL."""
        for repository in self._repositories:
            await repository.close()


def build(settings: ApiSettings, metrics: ApiMetrics) -> AddressRouter:
    """Return the application of one worker process. All workers share ``metrics``."""
    repository = AsyncPostgresOrderAndRejectRepository(_pool(settings, API_CONNECTIONS))
    # Requests that wait for a connection must not make the service report that it is not ready.
    health_repository = AsyncPostgresOrderRepository(_pool(settings, HEALTH_CONNECTIONS))
    request_metrics = RequestMetricsMiddleware(metrics, make_request_id)
    api = create_app(repository, settings, request_metrics, health_repository)
    api.add_middleware(_CloseRepositories(repository, health_repository))
    return AddressRouter(api, create_metrics_app(health_repository, request_metrics), settings.metrics_bind.port)


def _pool(settings: ApiSettings, max_connections: int) -> Pool:
    return Pool(
        settings.reader_url,
        application_name=APPLICATION_NAME,
        max_connections=max_connections,
        timeout_s=READ_TIMEOUT_S,
        connection_timeout_s=CONNECTION_TIMEOUT_S,
    )
