"""Orders, one and many: JSON for programs, pages for people."""

from __future__ import annotations

import hashlib

import falcon
import msgspec
from falcon.asgi import Request, Response

from orderlib.arguments import MAX_PAGE_SIZE
from orderlib.codecs import encode_order
from orderlib.contract import fits_postgres
from orderlib.errors import InvalidOrder
from orderlib.repository import PAGE_SIZE, AsyncOrderReader, Cursor, Page
from services.api.deadline import in_time
from services.api.negotiation import known_etags, prefers_page, require_acceptable
from services.api.pages import Pages
from services.api.parameters import bad_parameter

_REVALIDATE = "private, no-cache"


class OrderResource:
    """``/orders/{order_uid}``."""

    PARAMETERS = frozenset({"format"})

    def __init__(self, reader: AsyncOrderReader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    @in_time
    async def on_get(self, req: Request, resp: Response, order_uid: str) -> None:
        """The order, or 304 if the client has this version; that costs one read by primary key."""
        require_acceptable(req)
        if prefers_page(req):
            order = await self._reader.get(order_uid)
            req.context.order_uid = order_uid
            self._pages.show(resp, "order.html", order=order, query="")
            return
        resp.set_header("Cache-Control", _REVALIDATE)
        if known := known_etags(req):
            etag = (await self._reader.content_sha256(order_uid)).hex()
            if etag in known or "*" in known:
                req.context.order_uid = order_uid
                resp.set_header("ETag", f'"{etag}"')
                resp.status = falcon.HTTP_NOT_MODIFIED
                return
        body = encode_order(await self._reader.get(order_uid))
        req.context.order_uid = order_uid
        resp.set_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        resp.content_type = falcon.MEDIA_JSON
        resp.data = body

    on_head = on_get


class OrdersResource:
    """``/orders``: a page of the list, newest first."""

    PARAMETERS = frozenset({"limit", "cursor", "newer_than", "customer_id", "track_number", "format"})

    def __init__(self, reader: AsyncOrderReader, pages: Pages) -> None:
        self._reader = reader
        self._pages = pages

    @in_time
    async def on_get(self, req: Request, resp: Response) -> None:
        """A page of orders; two queries, however many."""
        require_acceptable(req)
        is_page = prefers_page(req)
        before = _cursor(req, "newer_than")
        if before and not is_page:
            raise bad_parameter("newer_than", "a request for a page", "one for JSON")
        limit = _limit(req)
        after = _cursor(req, "cursor")
        if before and after:
            raise bad_parameter("newer_than", "no cursor beside it", "both")
        filters = {name: _filter(req, name) for name in ("customer_id", "track_number")}
        if is_page:
            await self._show(resp, limit, after, before, filters)
            return
        page = await self._reader.newest(limit=limit, after=after, **filters)
        resp.set_header("Cache-Control", _REVALIDATE)
        resp.content_type = falcon.MEDIA_JSON
        resp.data = _encoded(page)

    on_head = on_get

    async def _show(
        self, resp: Response, limit: int, after: Cursor | None, before: Cursor | None, filters: dict[str, str | None]
    ) -> None:
        page = await self._reader.newer_than(before, limit=limit, **filters) if before else None
        if page is not None and len(page.orders) == limit:
            is_top = not (await self._reader.newer_than(page.orders[0].cursor, limit=1, **filters)).orders
        else:
            # Whoever comes back to the top sees a whole page there, not just the few orders that are newer.
            page, is_top = (
                await self._reader.newest(limit=limit, after=after, **filters),
                after is None or before is not None,
            )
        self._pages.show(resp, "orders.html", page=page, is_top=is_top, limit=limit, query="", **filters)


def _encoded(page: Page) -> bytes:
    orders = b",".join(encode_order(stored.order) for stored in page.orders)
    next_cursor = str(page.next_cursor) if page.next_cursor else None
    return b'{"orders":[%b],"next_cursor":%b}' % (orders, msgspec.json.encode(next_cursor))


def _parameter(req: Request, name: str) -> str | None:
    """Return a parameter of the query, which is there once at most."""
    value = req.params.get(name)
    assert not isinstance(value, list)
    return value


def _limit(req: Request) -> int:
    text = _parameter(req, "limit")
    if text is None:
        return PAGE_SIZE
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= MAX_PAGE_SIZE):
        raise bad_parameter("limit", f"an integer from 1 to {MAX_PAGE_SIZE}", "something else")
    return int(text)


def _cursor(req: Request, name: str) -> Cursor | None:
    text = _parameter(req, name)
    try:
        return None if text is None else Cursor.parse(text)
    except InvalidOrder as exc:
        raise bad_parameter(name, exc.faults[0].expected, exc.faults[0].found) from exc


def _filter(req: Request, name: str) -> str | None:
    text = _parameter(req, name)
    if text is not None and (not 1 <= len(text) <= 255 or not fits_postgres(text)):
        raise bad_parameter(name, "a text of 1 to 255 characters", "another")
    return text
