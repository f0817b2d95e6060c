"""The start page: the newest orders and the statistics of the store."""

from __future__ import annotations

import datetime as dt

from falcon.asgi import Request, Response

from orderlib.repository import STORED_RECENTLY, AsyncOrderRepository
from services.api.deadline import with_deadline
from services.api.pages import Pages

#: A smaller replication delay is not shown: it is normal under load, and a page is not read faster than that.
SHOWN_DELAY_S = 5.0


class HomeResource:
    """``/``."""

    def __init__(self, repository: AsyncOrderRepository, pages: Pages) -> None:
        self._repository = repository
        self._pages = pages

    @with_deadline
    async def on_get(self, _req: Request, resp: Response) -> None:
        """Show the newest orders and the statistics."""
        page = await self._repository.list_orders()
        stats = await self._repository.stats()
        delay_s = stats.replication_delay_s or 0.0
        self._pages.show(
            resp,
            "home.html",
            page=page,
            stats=stats,
            stored_recently=STORED_RECENTLY,
            behind=dt.timedelta(seconds=delay_s) if delay_s > SHOWN_DELAY_S else None,
            query="",
        )

    on_head = on_get
