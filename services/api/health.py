"""Whether the service lives, and whether it can do its work."""

from __future__ import annotations

import asyncio

import falcon
import msgspec
from falcon.asgi import Request, Response

from orderlib.repository import AsyncOrderReader


class LiveResource:
    """``/livez``: it answers, so it lives. Never touches the database."""

    async def on_get(self, _req: Request, resp: Response) -> None:
        """200."""
        resp.data = b'{"status":"live"}'
        resp.content_type = falcon.MEDIA_JSON
        resp.set_header("Cache-Control", "no-store")

    on_head = on_get


class ReadyResource:
    """``/readyz``: the database answers and has the tables we read."""

    def __init__(self, reader: AsyncOrderReader) -> None:
        self._reader = reader
        self._asking: asyncio.Task[float | None] | None = None

    async def on_get(self, _req: Request, resp: Response) -> None:
        """200 or 503. Anybody may ask; those who ask at once share one look at the database.

        A standby adds its replication delay. It stays ready whatever the delay is: old answers are for the operator
        to judge, and taking every standby away at once would leave readers with none.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._reader.check())
        delay_s = await asyncio.shield(self._asking)
        answer: dict[str, object] = {"status": "ready"}
        if delay_s is not None:
            answer["replication_delay_s"] = round(delay_s, 3)
        resp.data = msgspec.json.encode(answer)
        resp.content_type = falcon.MEDIA_JSON
        resp.set_header("Cache-Control", "no-store")

    on_head = on_get
