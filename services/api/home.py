"""The start page: search for an order, see the newest orders and the status of the store."""

from __future__ import annotations

import datetime as dt
from urllib.parse import quote, urlencode

import falcon
from falcon.asgi import Request, Response

from orderlib.errors import OrderNotFound
from orderlib.repository import STORED_RECENTLY, AsyncOrderRepository
from services.api.deadline import with_deadline
from services.api.pages import Pages

#: A smaller replication delay is not shown: it is normal under load, and a page is not read faster than that.
SHOWN_DELAY_S = 5.0


class HomeResource:
    """``/``."""

    PARAMETERS = frozenset({"q"})

    def __init__(self, reader: AsyncOrderRepository, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    @with_deadline
    async def on_get(self, req: Request, resp: Response) -> None:
        """Show the newest orders and the status or, with ``q``, redirect to what the search finds."""
        query = (req.get_param("q") or "").strip()
        if not query:
            page = await self._reader.list_orders()
            status = await self._reader.status()
            delay_s = status.replication_delay_s or 0.0
            self._pages.show(
                resp,
                "home.html",
                page=page,
                status=status,
                stored_recently=STORED_RECENTLY,
                behind=dt.timedelta(seconds=delay_s) if delay_s > SHOWN_DELAY_S else None,
                query="",
            )
            return
        found = await self._search(query)
        if found is None:
            self._pages.show(resp, "nothing_found.html", query=query)
            resp.status = falcon.HTTP_NOT_FOUND
        else:
            resp.set_header("Cache-Control", "no-store")
            resp.set_header("Location", found)
            resp.status = falcon.HTTP_SEE_OTHER

    on_head = on_get

    async def _search(self, query: str) -> str | None:
        """Return the URL of the order with this order_uid, or of the list with this track number or customer."""
        try:
            await self._reader.content_sha256(query)
        except OrderNotFound:
            pass
        else:
            return f"/orders/{quote(query, safe=':')}"
        if (await self._reader.list_orders(limit=1, track_number=query)).orders:
            return f"/orders?{urlencode({'track_number': query})}"
        if (await self._reader.list_orders(limit=1, customer_id=query)).orders:
            return f"/orders?{urlencode({'customer_id': query})}"
        return None
