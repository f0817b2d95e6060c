"""Liveness and readiness of the service."""

from __future__ import annotations

import asyncio

import falcon
from falcon.asgi import Request, Response

from orderlib.repository import AsyncOrderReader


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

    def __init__(self, reader: AsyncOrderReader) -> None:
        self._reader = reader
        self._check: asyncio.Task[None] | None = None

    async def on_get(self, _req: Request, resp: Response) -> None:
        """Answer with 200 or 503. Concurrent requests share one check of the database."""
        if self._check is None or self._check.done():
            self._check = asyncio.create_task(self._reader.check())
        await asyncio.shield(self._check)
        resp.data = b'{"status":"ready"}'
        resp.content_type = falcon.MEDIA_JSON
        resp.set_header("Cache-Control", "no-store")

    on_head = on_get
