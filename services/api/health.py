"""Liveness and readiness of the service."""

from __future__ import annotations

import asyncio

import falcon
import msgspec
from falcon.asgi import Request, Response

from orderlib.repository import AsyncOrderRepository
from services.api.deadline import with_deadline


class LiveResource:
    """``/livez``: the process answers requests. It never asks the database."""

    async def on_get(self, _req: Request, resp: Response) -> None:
        """Answer with 200."""
        resp.data = b'{"status":"live"}'
        resp.content_type = falcon.MEDIA_JSON
        resp.set_header("Cache-Control", "no-store")

    on_head = on_get


class ReadyResource:
    """``/readyz``: the database answers, and the reader may read the tables."""

    def __init__(self, repository: AsyncOrderRepository) -> None:
        self._repository = repository
        self._check: asyncio.Task[float | None] | None = None

    async def on_get(self, _req: Request, resp: Response) -> None:
        """Answer with 200 or 503. Concurrent requests share one check of the database.

        A standby adds its replication delay and stays ready with any delay: if all standbys became unready at once,
        readers would have none.
        """
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(with_deadline(self._repository.check)())
        delay_s = await asyncio.shield(self._check)
        answer: dict[str, object] = {"status": "ready"}
        if delay_s is not None:
            answer["replication_delay_s"] = round(delay_s, 3)
        resp.data = msgspec.json.encode(answer)
        resp.content_type = falcon.MEDIA_JSON
        resp.set_header("Cache-Control", "no-store")

    on_head = on_get
