"""What a worker process of the server runs."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from orderlib.config import ApiSettings
from orderlib.postgres.asynchronous import AsyncPostgresOrderReader
from services.api.app import create_app
from services.api.observation import Metrics, metrics_app

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class _Ending:
    """Middleware that only waits for the end."""

    def __init__(self, reader: AsyncPostgresOrderReader) -> None:
        self._reader = reader

    async def process_shutdown(self, scope: Mapping[str, Any], event: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Take leave of PostgreSQL."""
        await self._reader.close()


def build(settings: ApiSettings) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The API and the metrics, each on its own address; a request's tells which one it is for.

    ``PROMETHEUS_MULTIPROC_DIR`` must be set: there the workers add up.
    """
    reader = AsyncPostgresOrderReader(settings.reader_url, application_name="orderlib-api")
    api = create_app(reader, settings, Metrics(CollectorRegistry()), make_id=lambda: uuid.uuid4().hex)
    api.add_middleware(_Ending(reader))
    of_all_workers = CollectorRegistry()
    MultiProcessCollector(of_all_workers)  # type: ignore[no-untyped-call]
    metrics = metrics_app(of_all_workers)

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        is_for_metrics = scope["type"] == "http" and scope["server"][1] == settings.metrics_bind.port
        await (metrics if is_for_metrics else api)(scope, receive, send)

    return front
